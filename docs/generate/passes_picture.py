"""The passes in their order, and which fact goes from which pass to which: drawn from ``PASSES``."""

from __future__ import annotations

import inspect

from docstrings import first_sentence
from svg import box, line, page, text

from cggr_compile.passes.base import GraphPass, SemanticPass
from cggr_compile.pipeline import PASSES

ROW, NAME, COLUMN, TOP = 17, 178, 22, 190
FIND, REWRITE, JOINT = "#cfe2f3", "#fce5cd", "#d9ead3"
STAGES = ("model", "Dynamo: graph", "semantic passes", "AOT: joint graph", "joint passes", "Inductor")


def passes_table() -> str:
    """Markdown: every pass with the first sentence of its docstring."""
    rows = [
        f"| `{p.name}` | {p.stage} | {'yes' if p.optional else ''} | {first_sentence(inspect.getdoc(type(p)) or '')} |"
        for p in PASSES
    ]
    return "\n".join(["| pass | graph | optional | what it does |", "|---|---|---|---|", *rows])


def passes_picture() -> str:
    """A row for every pass, a column for every fact that one leaves for another."""
    facts = list(dict.fromkeys(fact for p in PASSES for fact in _provides(p)))
    left, width = NAME + 18, NAME + 18 + COLUMN * len(facts) + 90
    parts = [*_strip(width), *_legend()]
    for i, fact in enumerate(facts):
        x = left + COLUMN * (i + 0.5)
        parts.append(text(x, TOP - 8, fact.__name__, more=f'transform="rotate(-60 {x:g} {TOP - 8:g})"'))
        rows = [_middle(j) for j, p in enumerate(PASSES) if fact in (*_provides(p), *_reads(p))]
        parts.append(line(x, rows[0], x, rows[-1], "#888888"))
    for j, p in enumerate(PASSES):
        y = _middle(j)
        parts.append(line(NAME, y, width - 90, y, "#eeeeee"))
        parts.append(box(8, y - 7, NAME - 10, 14, _colour(p), "#999999" if not p.optional else "none"))
        parts.append(text(13, y + 4, p.name))
        for i, fact in enumerate(facts):
            x = left + COLUMN * (i + 0.5)
            if fact in _provides(p):
                parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="5" fill="#2f6fb0"/>')
            elif fact in _reads(p):
                parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="4" fill="#ffffff" stroke="#2f6fb0"/>')
    joint = next(j for j, p in enumerate(PASSES) if p.stage == "joint")
    y = _middle(joint) - ROW / 2
    parts.append(line(8, y, width - 90, y, "#222222"))
    parts.append(text(left, y + 14, "from here on the joint graph of forward and backward; passes leave no facts"))
    return page(width, _middle(len(PASSES)), parts, "The passes in their order, and the facts between them")


def _strip(width: float) -> list[str]:
    """From the model to the compiler, in boxes."""
    each = (width - 16) / len(STAGES)
    colours = ("#eeeeee", "#eeeeee", REWRITE, "#eeeeee", JOINT, "#eeeeee")
    parts = []
    for i, (words, colour) in enumerate(zip(STAGES, colours, strict=True)):
        x = 8 + i * each
        parts += [box(x, 8, each - 14, 24, colour, "#999999"), text(x + (each - 14) / 2, 24, words, "middle")]
        if i:
            parts.append(text(x - 7, 24, "→", "middle"))
    return parts


def _legend() -> list[str]:
    parts, y = [], 56.0
    for colour, words in ((FIND, "finds, changes nothing"), (REWRITE, "changes the graph"), (JOINT, "exact")):
        parts += [box(8, y, 14, 12, colour), text(28, y + 10, words)]
        y += 18
    parts += [box(8, y, 14, 12, "#ffffff", "#999999"), text(28, y + 10, "with a frame: not optional")]
    parts += [f'<circle cx="15" cy="{y + 26:g}" r="5" fill="#2f6fb0"/>', text(28, y + 30, "leaves a fact")]
    parts += [f'<circle cx="15" cy="{y + 44:g}" r="4" fill="#ffffff" stroke="#2f6fb0"/>', text(28, y + 48, "reads it")]
    return parts


def _middle(row: int) -> float:
    return TOP + ROW * (row + 0.5)


def _colour(p: GraphPass) -> str:
    return JOINT if not isinstance(p, SemanticPass) else FIND if p.analysis else REWRITE


def _provides(p: GraphPass) -> tuple[type, ...]:
    return p.provides if isinstance(p, SemanticPass) else ()


def _reads(p: GraphPass) -> tuple[type, ...]:
    return (*p.needs, *p.uses) if isinstance(p, SemanticPass) else ()
