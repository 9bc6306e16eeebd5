"""The README's table of steps as bars."""

from __future__ import annotations

from svg import box, line, page, text

FIRST = "| training step |"
LEFT, ROW, UNIT, TOP = 300, 42, 62, 44
STEP, MEMORY = "#2f6fb0", "#c8553d"


def steps(readme: str) -> list[tuple[str, float, float]]:
    """Rows of the table: what is trained, and how many times faster and smaller its step is."""
    lines = readme.splitlines()
    begin = next(i for i, row in enumerate(lines) if row.startswith(FIRST))
    rows: list[tuple[str, float, float]] = []
    for row in lines[begin + 2 :]:
        if not row.startswith("|"):
            return rows
        what, faster, smaller, *_ = (cell.strip() for cell in row.strip("|").split("|"))
        rows.append((what, float(faster), float(smaller)))
    return rows


def steps_picture(readme: str) -> str:
    """Two bars a row, from one end of dense training's."""
    rows = steps(readme)
    width = LEFT + UNIT * max(max(faster, smaller) for _, faster, smaller in rows) + 50
    height = TOP + ROW * len(rows) + 8
    parts = [box(LEFT, 12, 12, 12, STEP), text(LEFT + 18, 22, "step: times faster")]
    parts += [box(LEFT + 140, 12, 12, 12, MEMORY), text(LEFT + 158, 22, "memory: times less")]
    one = LEFT + UNIT
    parts += [line(one, TOP - 8, one, height - 8, "#222222"), text(one, TOP - 10, "dense", "middle")]
    for i, (what, *values) in enumerate(rows):
        y = TOP + ROW * i
        parts.append(text(LEFT - 10, y + 20, what, "end", 'font-size="12"'))
        for j, (value, colour) in enumerate(zip(values, (STEP, MEMORY), strict=True)):
            parts.append(box(LEFT, y + 3 + 15 * j, UNIT * value, 12, colour))
            parts.append(text(LEFT + UNIT * value + 6, y + 13 + 15 * j, f"{value:.2f}"))
    return page(width, height, parts, "Training steps beside the best dense baseline")
