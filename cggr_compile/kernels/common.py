"""What the kernels share: the order of tiles, the precision of products, loads by TMA, the interpreter's limits."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cggr_compile.compat import multiplies_in_tf32

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def grouped_tile(number, rows, columns, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows walk over the columns together, as neighbours in time share operands."""
    first = number // (GROUP * columns) * GROUP
    size = tl.minimum(rows - first, GROUP)
    inside = number % (GROUP * columns)
    return first + inside % size, inside // size


INTERPRETED = not isinstance(grouped_tile, triton.runtime.JITFunction)


def for_interpreter(tensor: Tensor) -> Tensor:
    """The tensor as a kernel multiplies it: in float32 where the interpreter's products of its type are wrong."""
    return tensor.float() if INTERPRETED and tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn) else tensor


def contiguous_rows(tensor: Tensor) -> Tensor:
    """The tensor, copied unless the stride of its last dimension is 1."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def precision(dtype: torch.dtype) -> str:
    """Of products, as PyTorch's settings have it."""
    return "tf32" if dtype == torch.float32 and multiplies_in_tf32() else "ieee"


def on_tensor_cores(dtype: torch.dtype) -> bool:
    """Whether products use them. Without, tiles loaded by TMA spill registers (compiled for sm_90 and sm_100)."""
    return dtype != torch.float32 or precision(dtype) == "tf32"


def tma_loads(device: torch.device, strides: Sequence[int], width: int, offset: int) -> bool:
    """Whether TMA can load tiles: Hopper or later, contiguous rows, all other strides multiples of 16 bytes.

    ``width``: bytes of an element. ``offset``: of the first one from an address that is a multiple of 16, in bytes.
    """
    aligned = offset % 16 == 0 and all(stride * width % 16 == 0 for stride in strides[:-1])
    return aligned and strides[-1] == 1 and torch.cuda.get_device_capability(device)[0] >= 9


def has_descriptors(tensor: Tensor) -> bool:
    """Whether TMA can load tiles of this tensor."""
    return tensor.is_cuda and tma_loads(tensor.device, tensor.stride(), tensor.element_size(), tensor.data_ptr())
