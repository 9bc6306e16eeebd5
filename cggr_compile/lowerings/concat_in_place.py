"""The lowerings of ``cggr::concat_in_place``, a buffer whose pieces other kernels write, and ``cggr::materialize``."""

from __future__ import annotations

from typing import Any

from cggr_compile import compat


def lower_concat_in_place(parts: list[Any], dim: int) -> Any:
    """Inductor's nodes for the parts, in, and for the tensor that they make, out."""
    return compat.written_side_by_side(parts, dim)


def lower_materialize(part: Any) -> Any:
    """Inductor's node for the values, in, and the same node, out, from now on a buffer."""
    return compat.realized(part)
