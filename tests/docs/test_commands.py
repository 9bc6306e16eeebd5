"""Every command of the documentation exists and takes the arguments that it is given."""

from __future__ import annotations

import argparse
import importlib
import re
import sys

import pytest
from doc_pages import PAGES, ROOT, commands

from cggr_compile.__main__ import main

TARGETS = set(re.findall(r"^([a-z-]+(?: [a-z-]+)*):", (ROOT / "Makefile").read_text(), flags=re.M))
TARGETS = {target for line in TARGETS for target in line.split()}
PLACES = {"FOLDER", "MODEL_FOLDER...", "RUN_FOLDER"}
SCRIPTS = ("benchmarks", "examples")


class ParsedError(Exception):
    """The arguments were taken."""


@pytest.fixture
def _only_parse(monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parsed(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)


def check(words: list[str], monkeypatch) -> bool:
    """Whether this is a command whose arguments can be checked; fails if they are wrong."""
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S+", word) or words[0] == "make"]
    if words[0] == "make":
        assert {word for word in words[1:] if "=" not in word} <= TARGETS, words
        return True
    script = next((i for i, word in enumerate(words) if word.startswith(SCRIPTS) and word.endswith(".py")), None)
    if script is not None:
        assert (ROOT / words[script]).is_file(), words
        module = importlib.import_module(words[script].partition("/")[2].removesuffix(".py"))
        call, arguments = module.main, words[script + 1 :]
    elif words[:3] == ["python", "-m", "cggr_compile"]:
        call, arguments = main, words[3:]
    else:
        return False
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    try:
        call()
    except ParsedError:
        pass
    except SystemExit as end:
        assert end.code == 0, words  # --help
    else:
        pytest.fail(f"{words} took no arguments")
    return True


@pytest.mark.usefixtures("_only_parse")
def test_commands_are_taken(monkeypatch, capsys):
    checked = [words for page in PAGES.values() for words in commands(page) if check(words, monkeypatch)]
    assert len(checked) > 50 and {words[0] for words in checked} == {"make", "python", "torchrun"}


@pytest.mark.usefixtures("_only_parse")
@pytest.mark.parametrize(
    "command",
    ["make nothing", "python benchmarks/step.py --no-such-option", "python -m cggr_compile tell model"],
)
def test_wrong_ones_are_found(command, monkeypatch, capsys):
    with pytest.raises(AssertionError):
        check(command.split(), monkeypatch)
