"""Docstrings of this package as Markdown."""

from __future__ import annotations

import re

_ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?([^`]*)`")


def markdown(text: str) -> str:
    """Sphinx's roles and double backticks become code, the two colons before a block one."""
    text = _ROLE.sub(r"`\1`", text)
    text = re.sub(r"``([^`]*)``", r"`\1`", text)
    return re.sub(r"::$", ":", text, flags=re.M)


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, in one line, as Markdown."""
    line = " ".join(text.strip().partition("\n\n")[0].split())
    sentence = re.split(r"(?<=[.])\s+(?=[A-Z`])", line, maxsplit=1)[0]
    return markdown(sentence).removesuffix(":").removesuffix(":").removesuffix(".") + "."
