"""The lowerings of ``cggr::join``, a buffer whose pieces are the outputs of other kernels, and of ``in_memory``."""

from __future__ import annotations

from typing import Any

from cggr_compile import compat


def lower_join(parts: list[Any], dim: int) -> Any:
    """Inductor's nodes for the parts, in, and for the joined tensor, out."""
    return compat.written_side_by_side(parts, dim)


def lower_in_memory(part: Any) -> Any:
    """Inductor's node for the values, in, and the same node, out, from now on a buffer."""
    return compat.realized(part)
