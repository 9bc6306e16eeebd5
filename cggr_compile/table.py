"""A table of named records of one kind: every one is a file of a package."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from importlib import import_module
from pkgutil import iter_modules
from typing import Generic, Protocol, TypeVar


class Record(Protocol):
    """What a table holds."""

    @property
    def name(self) -> str: ...

    @property
    def cells(self) -> dict[str, str]:
        """Column and text (Markdown) of the record's row in the documentation: first its name, then what it is."""


R = TypeVar("R", bound=Record)


class Table(Mapping[str, R], Generic[R]):
    """Records by name: those of the package in the order of their names, then what is registered."""

    def __init__(self, records: Iterable[R]) -> None:
        self._records = {record.name: record for record in sorted(records, key=lambda record: record.name)}

    @classmethod
    def of_package(cls, package: str, path: Iterable[str], attribute: str) -> Table[R]:
        """The table of what the modules of ``package`` call ``attribute``; ``record``, which defines it, has none.

        Raises:
            AttributeError: for another module without one.
        """
        names = [module.name for module in iter_modules(path) if module.name != "record"]
        return cls(getattr(import_module(f"{package}.{name}"), attribute) for name in names)

    def __getitem__(self, name: str) -> R:
        return self._records[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def names(self, chosen: Callable[[R], bool]) -> list[str]:
        """Names of the records that ``chosen`` says True of."""
        return [name for name, record in self.items() if chosen(record)]

    def register(self, record: R) -> ExitStack:
        """Add a record of another package, for this process.

        Returns:
            a context manager that takes it out again: ``with SELECTIONS.register(record): ...``.

        Raises:
            ValueError: for a name that the table has.
        """
        if record.name in self:
            raise ValueError(f"name must be new, got {record.name!r}; there are {list(self)}")
        self._records[record.name] = record
        undo = ExitStack()
        undo.callback(self._records.pop, record.name)
        return undo

    def markdown(self) -> str:
        """The table of the documentation."""
        head, *rows = _lines(*(record.cells for record in self.values()))
        return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *rows])

    def listing(self, indent: str = "") -> str:
        """The same as text for a docstring, see :func:`listed`."""
        entries = {}
        for record in self.values():
            (_, name), (_, text), *rest = record.cells.items()
            facts = "; ".join(f"{column}: {value}" for column, value in rest if value)
            entries[name] = f"{text} ({facts})" if facts else text
        return listed(entries, indent)


def _lines(*rows: dict[str, str]) -> list[str]:
    """Columns and rows of a table in Markdown."""
    lines = (list(rows[0]), *(list(row.values()) for row in rows))
    return ["|".join(["", *(f" {cell} " if cell else " " for cell in line), ""]) for line in lines]


def listed(entries: Mapping[str, str], indent: str) -> str:
    """An item for each entry, in lines of 120 characters; every line behind the first begins with ``indent``."""
    items = [
        textwrap.wrap(f"- {name}: {text}", 120 - len(indent), subsequent_indent="  ") for name, text in entries.items()
    ]
    return f"\n{indent}".join(line for item in items for line in item)
