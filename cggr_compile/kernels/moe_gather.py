"""Triton kernel that copies the rows of tokens into the order of their experts, for products that read them often."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 4, 1024  # of a tile


@triton.jit
def _gather_rows_kernel(
    tokens_ptr, stride, order_ptr, out_ptr, rows, H: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    token = tl.load(order_ptr + row, mask=row < rows, other=0) // TOP_K
    inside = (row < rows)[:, None] & (column < H)
    values = tl.load(tokens_ptr + token.to(tl.int64)[:, None] * stride + column, mask=inside)
    tl.store(out_ptr + row.to(tl.int64)[:, None] * H + column, values, mask=inside)


def gather_rows(tokens: Tensor, order: Tensor, top_k: int) -> Tensor:
    """[rows, H]: row r is that of the token order[r] // top_k of ``tokens`` [tokens, H], whose last stride is 1."""
    out = tokens.new_empty(order.shape[0], tokens.shape[1])
    block = min(triton.next_power_of_2(out.shape[1]), COLUMNS)
    grid = triton.cdiv(out.shape[0], ROWS), triton.cdiv(out.shape[1], block)
    with torch.cuda.device_of(tokens):
        _gather_rows_kernel[grid](
            *(tokens, tokens.stride(0), order, out, *out.shape), TOP_K=top_k, BLOCK_M=ROWS, BLOCK_H=block
        )
    return out
