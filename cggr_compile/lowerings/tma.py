"""Whether the tensor memory accelerator can load tiles of a value that Inductor has in memory."""

from __future__ import annotations

from typing import Any

from cggr_compile import compat


def tma_loads(node: Any, swapped: bool = False) -> bool:
    """``node``: of ``compat.realize_fixed_layout``. ``swapped``: with its last two dimensions the other way round."""
    from cggr_compile.kernels import common

    strides = compat.static_strides(node)
    if swapped:
        *outer, row, column = strides
        strides = (*outer, column, row)
    return common.tma_loads(node.get_device(), strides, node.get_dtype().itemsize, compat.alignment_offset(node))
