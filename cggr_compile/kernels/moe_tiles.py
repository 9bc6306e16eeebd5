"""Tile sizes of the grouped products, by kernel: of ``moe_products`` and ``moe_weight_gradient``."""

from __future__ import annotations

from typing import Any

import torch

OFTEN = 2048  # columns: rows that are multiplied by so many are read so often that a gather before pays


def configuration(kernel: str, dtype: torch.dtype, columns: int = 0) -> dict[str, Any]:
    """Tile sizes of ``swiglu`` (columns of gate and of up), ``down``, ``swiglu_backward``, ``d_hidden``,
    ``d_gate_up``, ``d_down``; of ``inner``, ``d_activation`` and ``add``, guessed from these.

    ``columns`` of the result where TMA loads tiles: those for 16 bits measured on an H200, the others on an H100
    (``python benchmarks/moe.py --sweep``).
    """
    narrow = kernel in ("swiglu", "swiglu_backward")
    if dtype == torch.float32:
        return dict(BLOCK_M=64, BLOCK_N=64 if narrow else 128, BLOCK_K=32, GROUP=8, num_warps=4, num_stages=3)
    tile = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP=8, num_warps=8, num_stages=3)
    if kernel == "swiglu":
        often = columns >= OFTEN
        return tile | dict(FLATTEN=often, GATHER=not often)
    if kernel in ("down", "d_hidden"):
        return tile | dict(BLOCK_N=256, GROUP=1 if columns else 8)
    if columns and kernel == "swiglu_backward":  # one program stores while the other multiplies
        return tile | dict(GROUP=1, FLATTEN=False, GATHER=False, PROGRAMS=2, maxnreg=128)
    if columns and kernel in ("d_gate_up", "d_down"):
        return tile | dict(BLOCK_N=256, GROUP=1 if kernel == "d_gate_up" else 8)
    return tile | dict(num_stages=4)


def configurations(kernel: str) -> list[dict[str, Any]]:
    """What is to be tried for 16 bits where there is somebody to time it: tile sizes with 128 rows where rows are
    multiplied, :func:`configuration` among them. Here ``swiglu`` gathers rows as it loads them."""
    one = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP=8, num_warps=8, num_stages=3)
    deep = one | dict(num_stages=4)
    wide = one | dict(BLOCK_N=256)
    narrow = one | dict(BLOCK_K=32, num_stages=4)
    if kernel in ("d_gate_up", "d_down"):
        return [one, deep, wide, wide | dict(num_stages=4), one | dict(BLOCK_M=256), narrow]
    if kernel == "swiglu_backward":  # the parts of its sum are made for 128 columns
        return [tile | dict(FLATTEN=flatten) for tile in (one, deep, narrow) for flatten in (True, False)]
    if kernel == "swiglu":
        two = one | dict(BLOCK_N=64, num_stages=4)
        return [one | dict(FLATTEN=True), *(tile | dict(FLATTEN=False) for tile in (one, deep, narrow, two))]
    return [tile | dict(FLATTEN=flatten) for tile in (wide, deep) for flatten in (True, False)]
