"""The lowering of ``cggr::attention_rows_backward``: two launches of our kernels in the generated code."""

from __future__ import annotations

from typing import Any, Literal

import torch

from cggr_compile import compat
from cggr_compile.ops.attention_rows import attention_rows_backward, fits_kernel


def lower_attention_rows_backward(
    grad: Any,
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    logsumexp: Any,
    rows: Any,
    mask: Any,
    scale: float,
    causal: bool,
    all_keys: bool,
    softcap: float = 0.0,
) -> Any:
    """Inductor's nodes for the operator's arguments, in, and for its three results, out."""
    arguments = (grad, query, key, value, out, logsumexp, rows, mask, scale, causal, all_keys, softcap)
    shapes = [compat.static_shape(node) for node in (query, key, value)]
    fits = None not in shapes and fits_kernel(query.get_device(), query.get_dtype(), *shapes)  # type: ignore[arg-type]
    if not fits:
        return compat.call_operator(attention_rows_backward, *arguments)
    from cggr_compile.kernels.attention_rows import Sizes, launches

    (batch, heads, slots, dim), (_, kv_heads, length, _), _ = shapes  # type: ignore[misc]
    rows_like = dict(grad=grad, q=query, k=key, v=value, out=out)
    read = {name: compat.realize_fixed_layout(node, last_contiguous=True) for name, node in rows_like.items()}
    read |= {"lse": compat.realize_fixed_layout(logsumexp), "rows": compat.realize_fixed_layout(rows)}
    kind: Literal["none", "bool", "additive"] = "none"
    if mask is not None:
        kind = "bool" if mask.get_dtype() == torch.bool else "additive"
        read["mask"] = compat.realize_fixed_layout(mask)
    strides = {name: compat.static_strides(node) for name, node in read.items()}
    if mask is None:
        read["mask"], strides["mask"] = read["rows"], (0, 0, 0, 0)  # any pointer: it is not read
    else:  # what broadcasts has no stride
        expanded = zip(compat.static_shape(mask), strides["mask"], strict=True)  # type: ignore[arg-type]
        strides["mask"] = tuple(0 if size == 1 else stride for size, stride in expanded)

    def empty(*shape: int, dtype: torch.dtype) -> Any:
        return compat.empty_buffer(shape, dtype, query.get_device())

    keys = length if all_keys else slots
    dq = empty(batch, heads, slots, dim, dtype=query.get_dtype())
    dk, dv = (empty(batch, kv_heads, keys, dim, dtype=node.get_dtype()) for node in (key, value))
    tensors = {**read, "dq": dq, "dk": dk, "dv": dv}
    for name in ("delta", "finite_lse"):
        tensors[name] = empty(batch, heads, slots, dtype=torch.float32)
    sizes = Sizes(batch, heads, kv_heads, slots, length, dim)
    for launch in launches(sizes, strides, query.get_dtype(), scale, causal, kind, all_keys, softcap):
        compat.launch(launch.kernel, launch.pointers(tensors), launch.arguments, launch.configs)
    return dq, dk, dv
