"""Tiles of one expert's rows by TMA: rows past the expert's last are read as zeros, and are not written.

TMA cuts a tile at the end of a tensor, never inside it. So the tensor is described as one of four dimensions, whose
strides make the address wrap around 64 bits: however the number of rows left is counted, the third coordinate reaches
its bound of 2 ** 30 at the expert's end, and the first two move the address back to where the row is.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

BOUND = tl.constexpr(2**30)
ANY = 2**31 - 2**16  # a bound that no coordinate reaches


def ragged(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Of a matrix whose last dimension is contiguous, in tiles of ``rows`` x ``columns``."""
    step = matrix.stride(0)
    # 2 ** 30 times the first stride is -step * 2 ** 30, modulo 2 ** 64 bytes
    return TensorDescriptor(
        matrix, [ANY, ANY, 2**30, matrix.shape[1]], [2**34 - step, step, step, 1], [1, 1, rows, columns]
    )


@triton.jit
def load_until(matrix, row, end, column):
    """The tile from ``row`` and ``column`` on, zeros from the row ``end`` on."""
    tile = matrix.load([BOUND, end, BOUND - (end - row), column])
    return tile.reshape(tile.shape[2], tile.shape[3])


@triton.jit
def store_until(matrix, row, end, column, tile):
    """Stores the tile's rows before ``end``."""
    matrix.store([BOUND, end, BOUND - (end - row), column], tile.reshape(1, 1, tile.shape[0], tile.shape[1]))
