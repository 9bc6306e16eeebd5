"""What the documentation takes from the code is what the code says. ``make docs`` writes it."""

from __future__ import annotations

import dataclasses
import re

import pytest
from doc_pages import PAGES, ROOT
from docstrings import first_sentence, markdown
from options_page import descriptions
from pages import generated, with_table
from passes_picture import passes_picture
from steps_picture import steps

from cggr_compile import Options
from cggr_compile.causes import Cause
from cggr_compile.pipeline import PASSES


def test_files_are_as_generated():
    for path, text in generated().items():
        assert path.read_text() == text, f"{path.relative_to(ROOT)}: run `make docs`"


def test_options_have_a_section_each():
    text = PAGES["docs/options.md"].read_text()
    names = [field.name for field in dataclasses.fields(Options)]
    assert re.findall(r"^## (\w+)$", text, flags=re.M) == names
    assert not re.search(r"(?<!`)``(?!`)|:class:", text)
    assert len(descriptions(Options.__doc__ or "")) == len(names) > 30


def test_the_picture_has_every_pass():
    picture = passes_picture()
    for one in PASSES:
        assert f">{one.name}</text>" in picture


def test_docstrings_become_markdown():
    assert markdown("See :class:`~a.B` and ``x``::") == "See `a.B` and `x`:"
    assert first_sentence("One of 2.5, ``f``::\n\n    f(x)") == "One of 2.5, `f`."
    assert first_sentence("One thing. Before::\n\n    f(x)") == "One thing."


def test_every_cause_has_a_remedy():
    """Of those that say why a model stays dense; the others are what the user asked for."""
    page = PAGES["docs/levels.md"].read_text()
    wanted = {cause.name for cause in Cause} - {"NOT_TRAINING", "EVERY_TOKEN"}
    assert set(re.findall(r"`([A-Z]+_[A-Z_]+)`", page)) == wanted


def test_a_table_is_replaced():
    assert with_table("a\n| x |\n|---|\n| 1 |\n\nb\n", "| x |\n|---|\n| 2 |\n| 3 |") == (
        "a\n| x |\n|---|\n| 2 |\n| 3 |\n\nb\n"
    )
    with pytest.raises(ValueError, match="no table begins with"):
        with_table("a\n", "| x |\n|---|")


def test_the_readme_is_short_and_its_figures_are_measured():
    readme = PAGES["README.md"].read_text()
    assert readme.count("\n") <= 150
    measured = PAGES["docs/benchmarks.md"].read_text()
    rows = steps(readme)
    assert len(rows) == 6
    for what, faster, smaller in rows:
        # of two GPUs the table has megabytes
        shown = f"{smaller:.2f}" if "two GPUs" not in what else "13322"
        assert any(f" {faster:.2f} |" in line and shown in line for line in measured.splitlines()), what
