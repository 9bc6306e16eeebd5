"""The page of options, from the docstring and the types of ``Options``."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from docstrings import markdown

from cggr_compile import Options

_WORDS = {
    bool: "`True`, `False`",
    int: "an integer",
    float: "a number",
    str: "a string",
    type(None): "`None`",
    Callable: "a function",
    Sequence: "a list",
    Mapping: "a dict",
}
HEAD = """# Options

<!-- written by `python docs/generate` from the docstring of cggr_compile.Options -->

```python
model.compile(backend="cggr", options={"min_tokens_ratio": 0.5, "gradient": "exact"})
```

`torch.compile`, `cggr_compile.train_step` and the callbacks take the same names. A misspelt option or a value out of
range is a `ValueError` that names it. `python -c "import cggr_compile; help(cggr_compile.Options)"` prints this list.
"""


def options_page() -> str:
    """Markdown: a table of every option, and a section for each."""
    texts, hints = descriptions(Options.__doc__ or ""), get_type_hints(Options)
    names = [field.name for field in dataclasses.fields(Options)]
    if list(texts) != names:
        raise ValueError(f"the docstring describes {sorted({*texts} ^ {*names})} in another way than there are options")
    rows, sections = [], []
    for field in dataclasses.fields(Options):
        default = dict() if field.default is dataclasses.MISSING else field.default
        values = ", ".join(_values(hints[field.name]))
        rows.append(f"| [`{field.name}`](#{field.name}) | {_code(default)} | {values} |")
        text = texts[field.name]
        sections.append(f"## {field.name}\n\nDefault {_code(default)}. {text[0].upper()}{text[1:]}\n")
    table = "\n".join(["| option | default | values |", "|---|---|---|", *rows])
    return "\n".join([HEAD, table, "", *sections])


def descriptions(docstring: str) -> dict[str, str]:
    """Names and Markdown of what a Google docstring lists under ``Attributes``."""
    body = inspect.cleandoc(docstring).partition("Attributes:\n")[2]
    entries = re.split(r"^ {4}(\w+): ", body, flags=re.M)[1:]
    return {name: _paragraphs(text) for name, text in zip(entries[::2], entries[1::2], strict=True)}


def _paragraphs(text: str) -> str:
    """Lists stand between empty lines, and lines are not broken."""
    lines: list[str] = []
    for line in (line[8:] if line.startswith(" " * 8) else line for line in text.rstrip().splitlines()):
        item, inside = line.startswith("- "), bool(lines) and lines[-1].startswith("- ")
        if lines and not item and (not inside or line.startswith("  ")):
            lines[-1] += " " + line.strip()
        else:
            lines += ["", line] if lines and item != inside else [line]
    return markdown("\n".join(lines))


def _values(hint: Any) -> list[str]:
    """What a type allows, in words."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return [_code(value) for value in parts]
    if origin in (Union, UnionType):
        return [value for part in parts for value in _values(part)]
    return [_WORDS[origin or hint]]


def _code(value: Any) -> str:
    return f'`"{value}"`' if isinstance(value, str) else f"`{value!r}`"
