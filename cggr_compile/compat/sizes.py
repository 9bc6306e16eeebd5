"""Symbolic sizes: what is known of them, and the guards on them."""

from __future__ import annotations

from typing import Any

import torch


def symbols(value: Any) -> set[Any]:
    """The symbols of a size; none for a number."""
    return set(value.node.expr.free_symbols) if isinstance(value, torch.SymInt) else set()


def depends_on_data(value: Any) -> bool:
    """Whether a size or number is known only when the graph runs."""
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) and not value.node.has_hint()


def hint(value: Any) -> int:
    """What a size is at the call that is being captured, without a guard."""
    return int(value.node.hint) if isinstance(value, torch.SymInt) else int(value)


def pin_size(value: Any) -> None:
    """Add the guard that a symbolic size has the value it has in this capture."""
    int(value)


def marked_dynamic(tensor: torch.Tensor) -> bool:
    """Whether the user demanded symbolic sizes (``mark_dynamic``, ``mark_unbacked``); Dynamo then refuses guards."""
    names = ("_dynamo_dynamic_indices", "_dynamo_unbacked_indices", "_dynamo_strict_unbacked_indices")
    return any(getattr(tensor, name, None) for name in names)
