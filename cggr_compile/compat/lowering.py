"""What the lowering of an operator to Inductor's code is made of: registration, layouts, buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def register_inductor_lowering(op: Any, lower: Callable[..., Any], eager_strides: bool = False) -> None:
    """``eager_strides``: the lowering gets its arguments with the strides that a call of the operator gets."""
    from torch._inductor.lowering import add_layout_constraint, register_lowering, tag_to_layout_constraint
    from torch._library.utils import get_layout_constraint_tag

    constraint = tag_to_layout_constraint(get_layout_constraint_tag(op, with_default=True)) if eager_strides else None
    if constraint is not None:
        add_layout_constraint(op, constraint)
    register_lowering(op, type_promotion_kind=None)(lower)


def call_operator(op: Any, *args: Any) -> Any:
    """In a lowering: a call of the operator itself."""
    from torch._inductor.lowering import fallback_handler

    return fallback_handler(op, add_to_fallback_set=False)(*args)


def static_shape(node: Any) -> tuple[int, ...] | None:
    """In a lowering: the sizes of a value; None if one of them is a symbol."""
    return _integers(node.get_size())


def static_strides(node: Any) -> tuple[int, ...]:
    """In a lowering: the strides of what ``realize_fixed_layout`` returned."""
    strides = _integers(node.get_stride())
    assert strides is not None, "static sizes have static strides"
    return strides


def _integers(values: Sequence[Any]) -> tuple[int, ...] | None:
    return tuple(int(v) for v in values) if not any(getattr(v, "free_symbols", None) for v in values) else None


def realize_fixed_layout(node: Any, last_contiguous: bool = False, contiguous: bool = False) -> Any:
    """In a lowering: ``node`` in memory, in the layout it keeps from here on."""
    from torch._inductor import ir

    storage = ir.ExternKernel.realize_input(node)
    ir.as_storage_and_layout(storage, freeze=True)
    if contiguous or (last_contiguous and storage.get_stride()[-1] != 1):
        storage = ir.ExternKernel.require_contiguous(storage)
    return ir.TensorBox(storage.data if isinstance(storage, ir.TensorBox) else storage)


def realized(node: Any) -> Any:
    """In a lowering: ``node`` as a buffer, which the kernel writes that computes it."""
    node.realize()
    return node


def empty_buffer(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Any:
    """In a lowering: uninitialised memory, contiguous."""
    from torch._inductor.lowering import empty_strided

    return empty_strided(list(shape), None, dtype=dtype, device=device)


def transposed_matrices(node: Any) -> Any:
    """In a lowering: a view of [E, M, N] as [E, N, M]."""
    from torch._inductor.lowering import permute

    return permute(node, [0, 2, 1])


def alignment_offset(node: Any) -> int:
    """In a lowering: where ``realize_fixed_layout`` put the first element, in bytes from a multiple of 16."""
    from torch._inductor.virtualized import V

    if node.get_name() in V.graph.unaligned_buffers:
        return 1
    (offset,) = _integers([node.get_layout().offset]) or (1,)
    return offset * int(node.get_dtype().itemsize)


def written_side_by_side(parts: Sequence[Any], axis: int) -> Any:
    """In a lowering: one buffer that the kernels of ``parts`` write into, each at its place along ``axis``."""
    from torch._inductor import ir

    return ir.TensorBox(ir.ConcatKernel.create(parts, axis))
