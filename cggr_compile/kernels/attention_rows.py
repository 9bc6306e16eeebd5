"""The launches of ``cggr::attention_rows_backward``: two Triton kernels, their sizes and strides.

The specification is ``cggr_compile.ops.attention_rows.attention_rows_backward_reference``; the kernels are in
``attention_gradients``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import triton
from torch import Tensor

from cggr_compile.kernels.attention_gradients import dkv_kernel, dq_kernel
from cggr_compile.kernels.common import INTERPRETED, contiguous_rows

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
AXES = dict.fromkeys(("grad", "q", "k", "v", "out", "lse"), "bhs") | {"rows": "bs", "mask": "bhsk"}


class Sizes(NamedTuple):
    """query [batch, heads, slots, dim], key [batch, kv_heads, length, dim]."""

    batch: int
    heads: int
    kv_heads: int
    slots: int
    length: int
    dim: int


class Launch(NamedTuple):
    """A kernel, the names of its tensors, its other arguments, and the ways to run it, the best guess first."""

    kernel: Any
    tensors: tuple[str, ...]
    arguments: dict[str, Any]
    configs: list[tuple[int, dict[str, int]]]  # programs; block sizes, warps, stages

    def pointers(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Its arguments that are tensors, from all that there are."""
        return {f"{name}_ptr": tensors[name] for name in self.tensors}


def _options(queries: int, keys: int, warps: int, stages: int) -> dict[str, int]:
    return dict(BLOCK_M=queries, BLOCK_N=keys, num_warps=warps, num_stages=stages)


def block_options(
    dtype: torch.dtype, block_d: int, all_keys: bool
) -> tuple[list[dict[str, int]], list[dict[str, int]]]:
    """Block sizes, warps and stages worth trying for the dq and for the dkv kernel, the best guess first.

    In 16 bits up to 128 that is the fastest of a sweep (dq: H100, dkv: H200); else what ptxas fits into registers
    (float32 above 64 spills some).
    """
    if dtype == torch.float32:  # no tensor cores: ieee products
        both = [_options(32, 32, 8, 1) if block_d <= 128 else _options(16, 16, 8, 1)]
    elif block_d <= 64:
        for_dq = [_options(64, 64, 4, 3), _options(128, 64, 4, 3), _options(128, 64, 8, 2)]
        low, high = _options(32, 64, 4, 3), _options(64, 64, 4, 3)
        # three blocks share a multiprocessor only without the registers of TOGETHER
        alone = [{**low, "TOGETHER": False}] if all_keys else []
        return for_dq, [*alone, *({**option, "TOGETHER": True} for option in (high, low))]
    elif block_d <= 128:
        for_dq = [_options(64, 32, 4, 3), _options(64, 64, 4, 2), _options(128, 32, 8, 2)]
        for_dkv = [_options(32, 64, 4, 3), _options(64, 128, 8, 2), _options(32, 64, 4, 2)]
        return for_dq, [{**option, "TOGETHER": True} for option in for_dkv]
    else:
        both = [_options(32, 32, 8, 2), _options(32, 32, 4, 2), _options(16, 32, 4, 2)]
    return both, [{**option, "TOGETHER": False} for option in both]


def launches(
    sizes: Sizes,
    strides: Mapping[str, Sequence[int]],
    dtype: torch.dtype,
    scale: float,
    causal: bool,
    mask: Literal["none", "bool", "additive"],
    all_keys: bool,
    softcap: float,
) -> tuple[Launch, Launch]:
    """The two launches. ``strides`` by the names in AXES, of all axes but the last of width ``dim``."""
    block_d = max(16, triton.next_power_of_2(sizes.dim))
    keys = sizes.length if all_keys else sizes.slots
    constants = dict(GROUP=sizes.heads // sizes.kv_heads, CAUSAL=causal, MASK=mask, CAP=softcap != 0.0)
    constants |= dict(D=sizes.dim, BLOCK_D=block_d)
    for_dq, for_dkv = block_options(dtype, block_d, all_keys)
    for_dkv = [{**option, "WHOLE": sizes.slots >= option["BLOCK_M"]} for option in for_dkv]

    def launch(
        kernel: Any, read: tuple[str, ...], write: tuple[str, ...], heads: int, configs: Any, **more: Any
    ) -> Launch:
        steps = {f"{n}_{axis}": stride for n in read for axis, stride in zip(AXES[n], strides[n], strict=False)}
        sizes_of = dict(heads=heads, slots=sizes.slots, length=sizes.length, scale=float(scale), softcap=float(softcap))
        return Launch(kernel, (*read, *write), {**sizes_of, **steps, **constants, **more}, configs)

    def configs(rows: int, block: str, heads: int, options: list[dict[str, int]]) -> list[tuple[int, dict[str, int]]]:
        return [(triton.cdiv(rows, option[block]) * heads * sizes.batch, option) for option in options]

    return (
        launch(
            *(dq_kernel, ("grad", "q", "k", "v", "out", "lse", "rows", "mask"), ("dq", "delta", "finite_lse")),
            *(sizes.heads, configs(sizes.slots, "BLOCK_M", sizes.heads, for_dq)),
        ),
        launch(
            *(dkv_kernel, ("grad", "q", "k", "v", "rows", "mask"), ("delta", "finite_lse", "dk", "dv")),
            *(sizes.kv_heads, configs(keys, "BLOCK_N", sizes.kv_heads, for_dkv)),
            ALL_KEYS=all_keys,
        ),
    )


def _check(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    if not query.dtype == key.dtype == value.dtype == grad.dtype or query.dtype not in DTYPES:
        raise ValueError(f"one of {DTYPES} for all: query {query.dtype}, key {key.dtype}, grad {grad.dtype}")
    if grad.shape != query.shape or out.shape != query.shape or key.shape != value.shape:
        raise ValueError("grad, out and query must have one shape, and key and value must")
    if query.shape[1] % key.shape[1] or query.shape[3] != key.shape[3] or query.shape[3] > 256:
        raise ValueError(f"query {tuple(query.shape)} does not fit key {tuple(key.shape)}, or heads wider than 256")


def attention_rows_backward_triton(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    rows: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    all_keys: bool,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``attention_rows_backward_reference`` on CUDA."""
    _check(grad, query, key, value, out)
    if INTERPRETED and query.dtype == torch.bfloat16:  # whose bfloat16 products are wrong
        grad, query, key, value, out = (tensor.float() for tensor in (grad, query, key, value, out))
        dq, dk, dv = attention_rows_backward_triton(
            grad, query, key, value, out, logsumexp, rows, mask, scale, causal, all_keys, softcap
        )
        return dq.bfloat16(), dk.bfloat16(), dv.bfloat16()

    batch, heads, slots, dim = query.shape
    kv_heads, length = key.shape[1:3]
    dq = query.new_empty(query.shape)
    dk, dv = (tensor.new_empty(batch, kv_heads, length if all_keys else slots, dim) for tensor in (key, value))
    if not query.numel():
        return dq, dk.zero_(), dv.zero_()

    read = dict(zip(("grad", "q", "k", "v", "out"), (grad, query, key, value, out), strict=True))
    read = {name: contiguous_rows(tensor) for name, tensor in read.items()}
    read |= {"lse": logsumexp, "rows": rows}
    kind: Literal["none", "bool", "additive"] = "none"
    if mask is not None:
        kind = "bool" if mask.dtype == torch.bool else "additive"
        read["mask"] = mask.expand(batch, heads, slots, length)
    strides = {name: tensor.stride() for name, tensor in read.items()}
    tensors = {**read, "dq": dq, "dk": dk, "dv": dv}
    if mask is None:
        strides["mask"], tensors["mask"] = (0, 0, 0, 0), rows  # any pointer: it is not read
    tensors["delta"], tensors["finite_lse"] = torch.empty(
        2, batch, heads, slots, dtype=torch.float32, device=query.device
    )
    sizes = Sizes(batch, heads, kv_heads, slots, length, dim)
    with torch.cuda.device_of(query):
        for launch in launches(sizes, strides, query.dtype, scale, causal, kind, all_keys, softcap):
            programs, options = launch.configs[0]
            launch.kernel[(programs,)](**launch.pointers(tensors), **launch.arguments, **options)
    return dq, dk, dv
