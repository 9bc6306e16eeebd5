"""The lowering of ``cggr::join_columns``: a buffer whose columns are the outputs of other kernels."""

from __future__ import annotations

from typing import Any

from cggr_compile import compat


def lower_join_columns(parts: list[Any]) -> Any:
    """Inductor's nodes for the parts, in, and for the joined matrix, out."""
    return compat.written_side_by_side(parts, 1)
