"""What the pictures share: a page of SVG, rectangles, lines and texts."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


def page(width: float, height: float, parts: Iterable[str], title: str) -> str:
    """A picture on white, so that it can be read on any background."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
    head += f'height="{height:g}" font-family="Helvetica, Arial, sans-serif" font-size="11">'
    return "\n".join([head, f"<title>{escape(title)}</title>", box(0, 0, width, height, "#ffffff"), *parts, "</svg>\n"])


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none") -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" fill="{fill}" stroke="{stroke}"/>'


def line(x1: float, y1: float, x2: float, y2: float, stroke: str = "#bbbbbb") -> str:
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{stroke}"/>'


def text(x: float, y: float, words: str, anchor: str = "start", more: str = "") -> str:
    """``more``: further attributes."""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="#222222" {more}>{escape(words)}</text>'
