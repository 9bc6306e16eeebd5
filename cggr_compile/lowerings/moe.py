"""The lowering of ``cggr::moe_mlp`` and its backward: under max-autotune, step by step as Inductor times them fastest.

Each grouped product (those of ``moe_clamped.py`` too) is a persistent template of several tile sizes, our plain kernel,
or ``F.grouped_mm`` with what it needs around it. Otherwise, and wherever the templates cannot serve, the operator is
called as one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from cggr_compile import compat
from cggr_compile.lowerings.tma import tma_loads
from cggr_compile.ops.moe import moe_mlp, moe_mlp_backward
from cggr_compile.ops.moe_clamped_steps import moe_biased_product
from cggr_compile.ops.moe_steps import (
    TILE_COLUMNS,
    moe_combine,
    moe_product,
    moe_routing_gradient,
    moe_schedule,
    moe_swiglu,
    moe_swiglu_backward,
    moe_weight_gradient,
)

SERVED = (torch.bfloat16, torch.float16)
GATHERED = ("swiglu", "swiglu_backward", "inner", "d_activation")  # of rows for every token
EPILOGUES = {"swiglu": 1, "swiglu_backward": 2}
MAX_ENTRIES = 2**31  # entries of a result: templates count in 32 bits
# The kernels' own functions do the work: a template binds their arguments, sizes as constants, and stores.
# A change of those functions changes this text, which is in the key of the autotuner's cache.
ROWS = """
{%- set names = ["A", "B", "OFFSETS", "QUEUE"] + ["ORDER"] * GATHER + ["INNER"] * SAVE + ["BIAS"] * BIASED %}
{{def_kernel(*(names + ["WEIGHTS", "D_INNER", "WEIGHTED"] * (EPILOGUE == 2)))}}
{%- if DESCRIPTORS and not GATHER %}
    a = tl.make_tensor_descriptor(A, [{{size("A", 0)}}, K], [{{stride("A", 0)}}, 1], [BLOCK_M, BLOCK_K])
{%- else %}
    a = A
{%- endif %}
{%- if MERGED %}
    b = tl.make_tensor_descriptor(
        B,
        [{{size("B", 0)}}, 2, N, K],
        [{{stride("B", 0)}}, N * {{stride("B", B_ROW)}}, {{stride("B", B_ROW)}}, 1],
        [1, 2, BLOCK_N, BLOCK_K],
    )
{%- elif DESCRIPTORS %}
    b = tl.make_tensor_descriptor(
        B,
        [{{size("B", 0)}}, {{size("B", B_ROW)}}, {{size("B", 3 - B_ROW)}}],
        [{{stride("B", 0)}}, {{stride("B", B_ROW)}}, 1],
        [1, {{"BLOCK_N, BLOCK_K" if TRANSPOSED else "BLOCK_K, BLOCK_N"}}],
    )
{%- else %}
    b = B
{%- endif %}
    row_tiles = tl.load(QUEUE)
    for number in tl.range(tl.program_id(0), row_tiles * tl.cdiv(N, BLOCK_N), PROGRAMS, flatten=FLATTEN):
        expert, first, end, part, row, column, inside, acc, up = rows_tile(
            number,
            row_tiles,
            a,
            {{stride("A", 0)}},
            b,
            {{stride("B", 0)}},
            {{stride("B", B_ROW)}},
            {{"ORDER" if GATHER else "None"}},
            OFFSETS,
            QUEUE,
            N,
            K,
            TOP_K,
            GATHER,
            TRANSPOSED,
            EPILOGUE,
            DESCRIPTORS and not GATHER,
            DESCRIPTORS,
            N % BLOCK_N == 0,
            K % BLOCK_K == 0,
            MERGED,
            PRECISION,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            GROUP,
        )
        at_row = row[:, None]
        at_column = column[None, :]
{%- if EPILOGUE == 2 %}
        d_weight = back_through_swiglu(
            acc, part, row, end, ORDER, WEIGHTS, INNER, D_INNER, WEIGHTED, N, N % BLOCK_N == 0, BLOCK_M, BLOCK_N
        )[:, None]
        there = at_row < end
        {{store_output(("part", "at_row"), "d_weight", "there", indent_width=8, val_shape=("BLOCK_M", "1"))}}
{%- else %}
{%- if BIASED %}
        bias = tl.load(BIAS + expert.to(tl.int64) * N + column, mask=column < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
{%- endif %}
{%- if EPILOGUE == 1 %}
        acc = through_swiglu(
            acc, up, first, end, part * BLOCK_N, row, column, inside, {{"INNER" if SAVE else "None"}}, N,
            DTYPE, SAVE, False
        )
{%- endif %}
        {{store_output(("at_row", "at_column"), "acc", "inside", indent_width=8, val_shape=("BLOCK_M", "BLOCK_N"))}}
{%- endif %}


from cggr_compile.kernels.moe_products import rows_tile
from cggr_compile.kernels.moe_swiglu import back_through_swiglu, through_swiglu  # SOURCE_KEY
"""
WEIGHT_GRADIENT = """
{{def_kernel("BY_ROW", "BY_TOKEN", "ORDER", "OFFSETS")}}
{%- set left, right = ("BY_TOKEN", "BY_ROW") if TOKENS_FIRST else ("BY_ROW", "BY_TOKEN") %}
    expert, row, column, acc = weight_gradient_tile(
        tl.program_id(0),
        {{left}},
        {{stride(left, 0)}},
        {{right}},
        {{stride(right, 0)}},
        ORDER,
        OFFSETS,
        {{size(left, 1)}},
        {{size(right, 1)}},
        TOP_K,
        TOKENS_FIRST,
        not TOKENS_FIRST,
        {{size(left, 1)}} % BLOCK_M == 0 and {{size(right, 1)}} % BLOCK_N == 0,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        GROUP,
    )
    at_row = row[:, None]
    at_column = column[None, :]
    inside = (at_row < {{size(left, 1)}}) & (at_column < {{size(right, 1)}})
    {{store_output(("expert", "at_row", "at_column"), "acc", "inside", val_shape=("BLOCK_M", "BLOCK_N"))}}


from cggr_compile.kernels.moe_weight_gradient import weight_gradient_tile  # SOURCE_KEY
"""


def lower_moe_mlp(
    hidden: Any, gate_up: Any, down: Any, weights: Any, order: Any, position: Any, offsets: Any, save: bool
) -> Any:
    """Inductor's nodes for the operator's arguments, in, and for its results, out."""
    if not serves(hidden, gate_up, down):
        return compat.call_operator(moe_mlp, hidden, gate_up, down, weights, order, position, offsets, save)
    grouped = GroupedProducts(hidden, order, offsets, int(weights.get_size()[1]))
    both = int(gate_up.get_size()[1])
    inner = grouped.empty(grouped.rows if save else 0, both)
    activation = grouped.rows_of("swiglu", hidden, gate_up, both // 2, written=[inner] if save else [])
    products = grouped.rows_of("down", activation, down, int(down.get_size()[1]))
    return compat.call_operator(moe_combine, products, weights, position, offsets, grouped.top_k), inner


def lower_moe_mlp_backward(
    grad: Any, hidden: Any, gate_up: Any, down: Any, weights: Any, inner: Any, order: Any, position: Any, offsets: Any
) -> Any:
    """As :func:`lower_moe_mlp`."""
    if not serves(hidden, gate_up, down):
        arguments = (grad, hidden, gate_up, down, weights, inner, order, position, offsets)
        return compat.call_operator(moe_mlp_backward, *arguments)
    grouped = GroupedProducts(hidden, order, offsets, int(weights.get_size()[1]))
    both = int(gate_up.get_size()[1])
    d_inner, weighted = grouped.empty(grouped.rows, both), grouped.empty(grouped.rows, both // 2)
    read = [compat.realize_fixed_layout(node, contiguous=True) for node in (inner, weights)]
    parts = grouped.rows_of("swiglu_backward", grad, down, both // 2, read=read, written=[d_inner, weighted])
    d_rows = grouped.rows_of("d_hidden", d_inner, gate_up, int(gate_up.get_size()[2]))
    d_gate_up = grouped.weight_gradient("d_gate_up", d_inner, hidden)
    d_down = grouped.weight_gradient("d_down", weighted, grad)
    d_hidden = compat.call_operator(moe_combine, d_rows, None, position, offsets, grouped.top_k)
    d_weights = compat.call_operator(moe_routing_gradient, parts, position, offsets, weights)
    return d_hidden, d_gate_up, d_down, d_weights


def serves(hidden: Any, gate_up: Any, down: Any) -> bool:
    """Whether there is something to time, and somebody to time it."""
    shapes = [compat.static_shape(node) for node in (hidden, gate_up, down)]
    if any(shape is None or 0 in shape or shape[-1] % 8 for shape in shapes):  # rows as F.grouped_mm wants them
        return False
    return hidden.get_dtype() in SERVED and _times(hidden.get_device(), hidden.get_dtype())


def _times(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cuda" and compat.runs_our_kernels() and compat.times_templates(device, dtype)


class GroupedProducts:
    """The grouped products of one call, each in the way that Inductor finds fastest.

    ``top_k``, ``rows`` (tokens * top_k), order, offsets and the queue of tiles are the same for all of them.
    """

    def __init__(self, hidden: Any, order: Any, offsets: Any, top_k: int) -> None:
        from cggr_compile.kernels.moe_products import library_takes, multiprocessors

        self.device, self.dtype = hidden.get_device(), hidden.get_dtype()
        self.rows, self.top_k = int(order.get_size()[0]), top_k
        self.experts = int(offsets.get_size()[0]) - 1
        self.order, self.offsets = compat.realize_fixed_layout(order), compat.realize_fixed_layout(offsets)
        self.library, self.programs = library_takes(self.device, self.dtype), multiprocessors(self.device)
        self.queue = compat.realize_fixed_layout(compat.call_operator(moe_schedule, self.offsets, self.rows))

    def empty(self, *shape: int) -> Any:
        return compat.realize_fixed_layout(compat.empty_buffer(shape, self.dtype, self.device))

    def rows_of(
        self,
        kernel: str,
        a: Any,
        b: Any,
        width: int,
        *,
        read: list[Any] | None = None,
        written: list[Any] | None = None,
        bias: Any = None,
    ) -> Any:
        """``kernel``: see ``multiply_rows``, or ``biased_down``; ``width`` is its N. ``read``, ``written``: what else
        there is. ``bias``: [experts, N], of ``inner`` and ``biased_down``."""
        gather, epilogue = kernel in GATHERED, EPILOGUES.get(kernel, 0)
        a, b = compat.realize_fixed_layout(a, last_contiguous=True), compat.realize_fixed_layout(b)
        if 1 not in compat.static_strides(b)[1:]:
            b = compat.realize_fixed_layout(b, contiguous=True)
        swapped = compat.static_strides(b)[2] != 1
        biases = [] if bias is None else [compat.realize_fixed_layout(bias, contiguous=True)]
        more = [*(read or []), *(written or []), *biases]
        transposed = (kernel in ("swiglu", "down", "inner", "biased_down")) != swapped
        descriptors = tma_loads(b, swapped) and (gather or tma_loads(a))
        constants = dict(
            N=width,
            K=int(a.get_size()[1]),
            B_ROW=2 if swapped else 1,
            TRANSPOSED=transposed,
            GATHER=gather,
            EPILOGUE=epilogue,
            SAVE=bool(written),
            BIASED=bias is not None,
            DESCRIPTORS=descriptors,
            MERGED=descriptors and transposed and kernel == "swiglu",
            DTYPE=str(self.dtype).replace("torch", "tl"),
            PROGRAMS=self.programs,
        )
        parts = -(-width // TILE_COLUMNS)
        shape, dtype = ((parts, self.rows), torch.float32) if epilogue == 2 else ((self.rows, width), self.dtype)
        options: dict[str, Any] = {"top_k": self.top_k} if gather else {}
        examples = {2: self._example_offsets, 3: self._example_queue, 4: self._example_order}
        return self._autotuned(
            kernel,
            [a, b, self.offsets, self.queue, *([self.order] if gather else []), *more],
            shape,
            dtype,
            options,
            constants,
            written=written or [],
            examples=examples if gather else {number: examples[number] for number in (2, 3)},
        )

    def weight_gradient(self, kernel: str, by_row: Any, by_token: Any) -> Any:
        """``kernel``: ``d_gate_up``, or ``d_down``, whose first dimension belongs to ``by_token``."""
        tokens_first = kernel == "d_down"
        by_row, by_token = (compat.realize_fixed_layout(node, last_contiguous=True) for node in (by_row, by_token))
        left, right = (by_token, by_row) if tokens_first else (by_row, by_token)
        return self._autotuned(
            kernel,
            [by_row, by_token, self.order, self.offsets],
            (self.experts, int(left.get_size()[1]), int(right.get_size()[1])),
            self.dtype,
            {"top_k": self.top_k, "tokens_first": tokens_first},
            {"TOKENS_FIRST": tokens_first},
            examples={2: self._example_order, 3: self._example_offsets},
        )

    def _autotuned(
        self,
        kernel: str,
        tensors: list[Any],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        options: dict[str, Any],
        constants: dict[str, Any],
        **more: Any,
    ) -> Any:
        from cggr_compile.kernels.common import precision
        from cggr_compile.kernels.moe_tiles import configurations

        constants = {**constants, "TOP_K": self.top_k, "PRECISION": repr(precision(self.dtype))}
        tiles = configurations(kernel) if math.prod(shape) < MAX_ENTRIES else []
        return compat.autotune(
            f"cggr_moe_{kernel}",
            tensors,
            shape,
            dtype,
            [(_operator(kernel, library), options) for library in (False, True)[: 1 + self.library]],
            _template(kernel),
            [{**constants, **tile} for tile in tiles],
            **more,
        )

    def _example_offsets(self, _: Any = None) -> Tensor:
        """As many rows for every expert."""
        return torch.linspace(0, self.rows, self.experts + 1, device=self.device).round().int()

    def _example_queue(self, _: Any) -> Tensor:
        queue: Tensor = moe_schedule(self._example_offsets(), self.rows)
        return queue

    def _example_order(self, _: Any) -> Tensor:
        return torch.randperm(self.rows, device=self.device, dtype=torch.int32)


def _persistent(*sizes_and_meta: Any) -> tuple[int, int, int]:
    return sizes_and_meta[-1]["PROGRAMS"], 1, 1


def _by_tile(experts: int, rows: int, columns: int, meta: dict[str, Any]) -> tuple[int, int, int]:
    return experts * -(-rows // meta["BLOCK_M"]) * -(-columns // meta["BLOCK_N"]), 1, 1


@cache
def _template(kernel: str) -> Any:
    from cggr_compile.kernels.moe_products import rows_tile
    from cggr_compile.kernels.moe_swiglu import back_through_swiglu, through_swiglu
    from cggr_compile.kernels.moe_weight_gradient import weight_gradient_tile

    by_tile = kernel in ("d_gate_up", "d_down")
    of_rows = (back_through_swiglu, rows_tile, through_swiglu)
    source, functions = (WEIGHT_GRADIENT, (weight_gradient_tile,)) if by_tile else (ROWS, of_rows)
    text = source.strip().replace("SOURCE_KEY", " ".join(function.cache_key for function in functions))
    return compat.triton_template(f"cggr_moe_{kernel}", _by_tile if by_tile else _persistent, text)


def _gathered(
    a: Any, b: Any, offsets: Any, queue: Any, order: Any, inner: Any = None, *more: Any, top_k: int, library: bool
) -> tuple[Any, ...]:
    return a, b, order, offsets, inner, *more, top_k, library


def _plain(a: Any, b: Any, offsets: Any, queue: Any, *, library: bool, transposed: bool) -> tuple[Any, ...]:
    return a, b, offsets, transposed, library


def _inner(
    a: Any, b: Any, offsets: Any, queue: Any, order: Any, bias: Any, *, top_k: int, library: bool
) -> tuple[Any, ...]:
    return a, b, bias, order, offsets, top_k, True, library


def _d_activation(
    a: Any, b: Any, offsets: Any, queue: Any, order: Any, *, top_k: int, library: bool
) -> tuple[Any, ...]:
    return a, b, None, order, offsets, top_k, False, library


def _biased_down(a: Any, b: Any, offsets: Any, queue: Any, bias: Any, *, library: bool) -> tuple[Any, ...]:
    return a, b, bias, None, offsets, 1, True, library


def _summed(
    by_row: Any, by_token: Any, order: Any, offsets: Any, *, top_k: int, tokens_first: bool, library: bool
) -> tuple[Any, ...]:
    return by_row, by_token, order, offsets, top_k, tokens_first, library


STEPS: dict[str, tuple[Any, Callable[..., tuple[Any, ...]]]] = {
    "swiglu": (moe_swiglu, _gathered),
    "down": (moe_product, partial(_plain, transposed=True)),
    "swiglu_backward": (moe_swiglu_backward, _gathered),
    "d_hidden": (moe_product, partial(_plain, transposed=False)),
    "inner": (moe_biased_product, _inner),
    "d_activation": (moe_biased_product, _d_activation),
    "biased_down": (moe_biased_product, _biased_down),
    "d_gate_up": (moe_weight_gradient, _summed),
    "d_down": (moe_weight_gradient, _summed),
}


@cache
def _operator(kernel: str, library: bool) -> Any:
    """The step as an operator, with arguments made of the template's."""
    op, arrange = STEPS[kernel]
    name = f"cggr_moe_{kernel}{'_library' if library else ''}"
    return compat.operator_choice(name, op, partial(arrange, library=library))
