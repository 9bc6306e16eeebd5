"""Every generated file of the documentation, and the generated tables of written ones."""

from __future__ import annotations

from pathlib import Path

from options_page import options_page
from passes_picture import passes_picture, passes_table
from steps_picture import steps_picture

from cggr_compile.scorings import SCORINGS
from cggr_compile.selections import SELECTIONS

ROOT = Path(__file__).resolve().parent.parent.parent
DOCS = ROOT / "docs"


def generated() -> dict[Path, str]:
    """Files and what each has to hold."""
    selection = (DOCS / "selection.md").read_text()
    for table in (SELECTIONS.markdown(), SCORINGS.markdown()):
        selection = with_table(selection, table)
    return {
        DOCS / "options.md": options_page(),
        DOCS / "selection.md": selection,
        DOCS / "architecture.md": with_table((DOCS / "architecture.md").read_text(), passes_table()),
        DOCS / "pictures" / "passes.svg": passes_picture(),
        DOCS / "pictures" / "steps.svg": steps_picture((ROOT / "README.md").read_text()),
    }


def with_table(text: str, table: str) -> str:
    """``text`` with ``table`` in place of the one that has the same first line.

    Raises:
        ValueError: there is none.
    """
    lines, wanted = text.splitlines(), table.splitlines()
    if wanted[0] not in lines:
        raise ValueError(f"no table begins with {wanted[0]!r}")
    begin = end = lines.index(wanted[0])
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    return "\n".join([*lines[:begin], *wanted, *lines[end:]]) + "\n"
