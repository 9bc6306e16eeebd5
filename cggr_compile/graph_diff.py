"""``python -m cggr_compile diff``: what happened between two stages of a dump."""

from __future__ import annotations

import difflib
from pathlib import Path

CONTEXT = 2  # unchanged lines around a change


def find_stage(name: str | Path) -> Path:
    """The file of a stage: its path, or the beginning of one that fits a single file (``graphs/07``).

    A stage may be named without its number, too: ``graphs/select_rows``.

    Raises:
        ValueError: no file of a dump fits, or several do.
    """
    path = Path(name)
    if path.is_file():
        return path
    there = sorted(path.parent.glob("[0-9][0-9]_*.py")) if path.parent.is_dir() else []
    fits = [file for file in there if file.stem.split("_", 1)[1] == path.name]
    fits = fits or [file for file in there if file.name.startswith(path.name)]
    if path.is_dir() or len(fits) != 1:
        known = ", ".join(file.name for file in there) or "none"
        raise ValueError(f"stage must name one file of a dump, got {str(name)!r}; stages in {path.parent}: {known}")
    return fits[0]


def diff_stages(before: str | Path, after: str | Path) -> list[str]:
    """The changed lines between two stages, as a unified diff without the headers; empty if they are alike.

    Raises:
        ValueError: as :func:`find_stage`.
    """
    first, second = find_stage(before), find_stage(after)
    return diff_texts(first.read_text(), second.read_text(), first.name, second.name)


def diff_texts(before: str, after: str, before_name: str, after_name: str) -> list[str]:
    """The same for two texts with headers."""
    lines = difflib.unified_diff(body(before), body(after), before_name, after_name, lineterm="", n=CONTEXT)
    return list(lines)


def body(text: str) -> list[str]:
    """The lines of a stage behind its header."""
    lines = text.splitlines()
    while lines and (lines[0].startswith("#") or not lines[0]):
        lines.pop(0)
    return lines
