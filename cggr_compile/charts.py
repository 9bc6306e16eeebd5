"""Small charts as SVG text: lines over steps, a histogram."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 460, 180, 56, 24, 22
COLOURS = ("#2f6fb0", "#c8553d", "#4c9f70")


def line_chart(series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Lines through (x, y) points, one for every name. Points that are not finite are left out."""
    finite = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in series.items()}
    points = [point for line in finite.values() for point in line]
    if not points:
        return ""
    box = _Box.around([x for x, _ in points], [y for _, y in points])
    parts = []
    for i, (name, line) in enumerate(finite.items()):
        path = " ".join(f"{box.x(x):.1f},{box.y(y):.1f}" for x, y in line)
        colour = COLOURS[i % len(COLOURS)]
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{box.x(x):.1f}" cy="{box.y(y):.1f}" r="2" fill="{colour}"/>' for x, y in line[:200]]
        parts.append(_label(i, name, colour))
    return _svg([*box.axes(), *parts])


def histogram(values: Mapping[str, Sequence[float]], bins: int) -> str:
    """How often values occur, each name's in front of the one before, in common bins."""
    everything = [value for part in values.values() for value in part if math.isfinite(value)]
    if not everything:
        return ""
    low, high = min(everything), max(everything)
    width = (high - low) / bins or 1.0
    counts = {}
    for name, part in values.items():
        counts[name] = [0] * bins
        for value in part:
            if math.isfinite(value):
                counts[name][min(int((value - low) / width), bins - 1)] += 1
    box = _Box(low, low + width * bins, 0.0, float(max(max(each) for each in counts.values())))
    parts = []
    for i, (name, each) in enumerate(counts.items()):
        colour = COLOURS[i % len(COLOURS)]
        for j, count in enumerate(each):
            x, top = box.x(low + j * width), box.y(count)
            size = f'width="{box.x(low + width) - box.x(low):.1f}" height="{box.y(0) - top:.1f}"'
            parts.append(f'<rect x="{x:.1f}" y="{top:.1f}" {size} fill="{colour}" fill-opacity="0.7"/>')
        parts.append(_label(i, f"{name} ({sum(each)})", colour))
    return _svg([*box.axes(), *parts])


class _Box:
    """From values to places in the picture."""

    def __init__(self, left: float, right: float, low: float, high: float) -> None:
        self.left, self.right = left, right if right > left else left + 1.0
        self.low, self.high = low, high if high > low else low + (abs(low) or 1.0)

    @classmethod
    def around(cls, xs: Sequence[float], ys: Sequence[float]) -> _Box:
        return cls(min(xs), max(xs), min(min(ys), 0.0), max(ys))

    def x(self, value: float) -> float:
        return LEFT + (value - self.left) / (self.right - self.left) * (WIDTH - LEFT - 10)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.low) / (self.high - self.low) * (HEIGHT - BOTTOM - TOP)

    def axes(self) -> list[str]:
        """Both axes with the values at their ends."""
        bottom, right = HEIGHT - BOTTOM, WIDTH - 10
        lines = [
            f'<path d="M{LEFT},{TOP}V{bottom}H{right}" fill="none" stroke="#888"/>',
            *(_text(LEFT - 6, self.y(value) + 4, value, "end") for value in (self.low, self.high)),
            _text(LEFT, HEIGHT - 6, self.left, "start"),
            _text(right, HEIGHT - 6, self.right, "end"),
        ]
        return lines


def _text(x: float, y: float, value: float, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{value:.4g}</text>'


def _label(i: int, name: str, colour: str) -> str:
    return f'<text x="{LEFT + 8 + 150 * i}" y="14" fill="{colour}">{name}</text>'


def _svg(parts: Sequence[str]) -> str:
    inner = "\n".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">\n{inner}\n</svg>'
