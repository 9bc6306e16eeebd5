"""The lowering of ``cggr::score_partials``: under max-autotune, a template whose tile sizes Inductor times.

Otherwise, and wherever the template cannot serve, the operator is called, as it would be without a lowering.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from cggr_compile import compat
from cggr_compile.lowerings.tma import tma_loads
from cggr_compile.ops.score import FP8, score_partials

SERVED = (torch.bfloat16, torch.float16, torch.float32, FP8)
# The kernel's own function does the work: the template binds its arguments, sizes as constants, and stores.
# A change of that function changes this text, which is in the key of the autotuner's cache.
TEMPLATE = """
{{def_kernel(*(["X", "W"] + ["BIAS"] * HAS_BIAS + ["ROW_SCALE", "COLUMN_SCALE"] * HAS_SCALES))}}
    N = {{size("X", 0)}}
    V = {{size("W", 0)}}
    H = {{size("X", 1)}}
{%- if DESCRIPTORS %}
    x = tl.make_tensor_descriptor(X, [N, H], [{{stride("X", 0)}}, 1], [BLOCK_M, BLOCK_K])
    w = tl.make_tensor_descriptor(W, [V, H], [{{stride("W", 0)}}, 1], [BLOCK_N, BLOCK_K])
{%- else %}
    x = X
    w = W
{%- endif %}
    part, row, high, total, slope, second = score_block(
        x,
        {{stride("X", 0)}},
        {{stride("X", 1)}},
        w,
        {{stride("W", 0)}},
        {{"BIAS" if HAS_BIAS else "None"}},
        {{"ROW_SCALE" if HAS_SCALES else "None"}},
        {{"COLUMN_SCALE" if HAS_SCALES else "None"}},
        N,
        V,
        H,
        {{size(None, 1)}},
        tl.full([], SCALE, tl.float32),
        tl.full([], CAP, tl.float32),
        SPAN,
        HAS_BIAS,
        HAS_SCALES,
        CAP != 0.0,
        DESCRIPTORS,
        H % BLOCK_K == 0,
        V % BLOCK_N == 0,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        GROUP,
    )
    # [BLOCK_M, 4] in the order of the result: what is joined last varies fastest
    numbers = tl.reshape(tl.join(tl.join(high, slope), tl.join(total, second)), [BLOCK_M, 4])
    number = tl.arange(0, 4)[None, :]
    at = row[:, None]
    mask = at < N
    {{store_output(("number", "part", "at"), "numbers", "mask", val_shape=("BLOCK_M", "4"))}}


from cggr_compile.kernels.score import score_block  # SOURCE_KEY
"""


def lower_score_partials(
    hidden: Any,
    weight: Any,
    bias: Any,
    scale: float,
    softcap: float,
    span: int,
    row_scale: Any = None,
    column_scale: Any = None,
) -> Any:
    """Inductor's nodes for the operator's arguments, in, and for its result, out."""
    configs = _configs(hidden, weight, span)
    if not configs:
        return compat.call_operator(score_partials, hidden, weight, bias, scale, softcap, span, row_scale, column_scale)
    from cggr_compile.kernels.common import on_tensor_cores

    given = [node for node in (bias, row_scale, column_scale) if node is not None]
    nodes = [
        compat.realize_fixed_layout(hidden),
        *(compat.realize_fixed_layout(node, last_contiguous=True) for node in (weight, *given)),
    ]
    modes: dict[str, Any] = dict(HAS_BIAS=bias is not None, HAS_SCALES=row_scale is not None)
    constants = dict(SCALE=float(scale), CAP=float(softcap), SPAN=span, **modes)
    constants["DESCRIPTORS"] = on_tensor_cores(hidden.get_dtype()) and all(map(tma_loads, nodes[:2]))
    rows, vocab = int(hidden.get_size()[0]), int(weight.get_size()[0])
    return compat.autotune(
        "cggr_score_partials",
        nodes,
        (4, -(-vocab // span), rows),
        torch.float32,
        [(_operator(), dict(scale=scale, softcap=softcap, span=span, bias=modes["HAS_BIAS"]))],
        _template(),
        [{**constants, **config} for config in configs],
    )


def _configs(hidden: Any, weight: Any, span: int) -> list[dict[str, Any]]:
    """The template's tile sizes to be tried; none where it cannot serve or nothing is to be timed."""
    shapes = compat.static_shape(hidden), compat.static_shape(weight)
    device, dtype = hidden.get_device(), hidden.get_dtype()
    if None in shapes or 0 in shapes[0] or dtype not in SERVED:  # type: ignore[operator]
        return []
    if device.type != "cuda" or not compat.runs_our_kernels() or not compat.times_templates(device, torch.float32):
        return []
    from cggr_compile.kernels.common import precision
    from cggr_compile.kernels.head_product import configurations
    from cggr_compile.kernels.score import multiplies_fp8

    if dtype == FP8 and not multiplies_fp8(device):
        return []
    card: Any = torch.cuda.get_device_properties(device)

    def fits(config: dict[str, int]) -> bool:  # all but the tiles that are being multiplied wait in shared memory
        tile = (config["BLOCK_M"] + config["BLOCK_N"]) * config["BLOCK_K"] * dtype.itemsize
        return (config["num_stages"] - 1) * tile <= card.shared_memory_per_block_optin and span % config["BLOCK_N"] == 0

    return [{**config, "PRECISION": repr(precision(dtype))} for config in configurations(dtype) if fits(config)]


def _programs(numbers: int, parts: int, rows: int, meta: dict[str, Any]) -> tuple[int, int, int]:
    return -(-rows // meta["BLOCK_M"]) * parts, 1, 1


@cache
def _template() -> Any:
    from cggr_compile.kernels.score import score_block

    source = TEMPLATE.strip().replace("SOURCE_KEY", score_block.cache_key)
    return compat.triton_template("cggr_score_partials", _programs, source)


def _arguments(
    hidden: Any, weight: Any, *rest: Any, scale: float, softcap: float, span: int, bias: bool
) -> tuple[Any, ...]:
    """The operator's arguments, of the tensors that there are."""
    scales = rest[1:] if bias else rest
    return (hidden, weight, rest[0] if bias else None, scale, softcap, span, *scales)


@cache
def _operator() -> Any:
    return compat.operator_choice("cggr_score_partials", score_partials, _arguments)
