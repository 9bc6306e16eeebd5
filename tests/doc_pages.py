"""The documentation's pages: their code blocks, and what a block finds when it is run."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import models
import torch

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
_BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.M | re.S)
COMMANDS = ("make", "python", "torchrun", "pip", "cggr-compile")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page. ``line``: of its first line of code, from 0. ``prints``: what the page says it does."""

    page: Path
    language: str
    code: str
    line: int
    prints: str | None


def blocks(page: Path, language: str) -> list[Block]:
    text = page.read_text()
    found = []
    for match in _BLOCK.finditer(text):
        indent, named, code = match.groups()
        if named == language:
            lines = [line.removeprefix(indent) for line in code.splitlines()]
            prints = re.match(r"\s*It prints `([^`]+)`", text[match.end() :])
            line = text.count("\n", 0, match.start(3))
            found.append(Block(page, language, "\n".join(lines) + "\n", line, prints[1] if prints else None))
    return found


def commands(page: Path) -> list[list[str]]:
    """The command lines of a page, in blocks without a language and in code between backticks, as words."""
    text = page.read_text()
    lines = [
        line for block in blocks(page, "") for line in block.code.replace("\\\n", " ").splitlines() if line.strip()
    ]
    lines += [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", _BLOCK.sub("", text))]
    found = []
    for line in lines:
        words = [word for word in re.sub(r"^(\w+=\S+ )+", "", line.strip()).split(" ") if word]
        if len(words) > 1 and words[0] in COMMANDS:
            found.append(shlex.split(line))
    return found


def run(block: Block, names: dict[str, Any]) -> None:
    """Run it, so that errors, and whoever reads the source of its functions, find it in the page."""
    code = compile("\n" * block.line + block.code, str(block.page), "exec")
    exec(code, names)


def given() -> dict[str, Any]:
    """What blocks take for granted: a model that is not compiled, and batches for it."""
    import cggr_compile

    model = models.family("llama", num_hidden_layers=1)
    batch = models.make_batch()
    ids, labels = batch["input_ids"], batch["labels"]
    return {
        "torch": torch,
        "cggr_compile": cggr_compile,
        "model": model,
        "batch": batch,
        "loader": [batch] * 2,
        "ids": ids,
        "labels": labels,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
    }
