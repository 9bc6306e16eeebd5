"""An extension of griffe, which reads the docstrings for the API page: they are Markdown there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))

from docstrings import markdown


class Roles(griffe.Extension):
    """Roles and double backticks of every docstring become code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
