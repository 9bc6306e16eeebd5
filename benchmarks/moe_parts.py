"""What a Mixture-of-Experts layer does besides its grouped products, and the whole of it by the fastest settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from moe_problem import Problem
from rich.console import Console
from torch import Tensor
from triton.testing import do_bench

Times = list[tuple[float, dict[str, Any]]]


def _ms(call: Callable[[], Any]) -> float:
    return float(do_bench(call, warmup=10, rep=60, return_mode="median"))


def parts(problem: Problem, console: Console) -> dict[str, float]:
    """Milliseconds of everything that is no grouped product."""
    from cggr_compile.kernels.moe import combine
    from cggr_compile.kernels.moe_gather import gather_rows
    from cggr_compile.kernels.moe_products import schedule
    from cggr_compile.kernels.moe_routing import permute_triton, top_experts_triton
    from cggr_compile.kernels.routing_gradient import routing_gradient

    shape = problem.shape
    rows = problem.order.shape[0]
    scores = torch.randn(shape.tokens, shape.experts, device="cuda").softmax(1)
    of_rows = torch.randn_like(problem.token_rows)
    sums = torch.randn(shape.inner // 128, rows, device="cuda")
    calls: dict[str, Callable[[], Any]] = {
        "top_experts": lambda: top_experts_triton(scores, shape.top_k),
        "permute": lambda: permute_triton(problem.chosen, shape.experts),
        "schedule": lambda: schedule(problem.offsets, rows, 128),
        "gather_rows": lambda: gather_rows(problem.tokens, problem.order, shape.top_k),
        "tokens[order // top_k]": lambda: problem.tokens[problem.order // shape.top_k],
        "combine, weighted": lambda: combine(of_rows, problem.weights, problem.position, problem.offsets, shape.top_k),
        "combine": lambda: combine(of_rows, None, problem.position, problem.offsets, shape.top_k),
        "routing_gradient": lambda: routing_gradient(sums, problem.position, problem.offsets, problem.weights),
        "copy of the rows": lambda: of_rows.copy_(problem.token_rows),
    }
    torch.testing.assert_close(calls["gather_rows"](), calls["tokens[order // top_k]"]())
    found = {name: _ms(call) for name, call in calls.items()}
    for name, ms in found.items():
        console.print(f"  {ms:8.3f} ms  {name}", highlight=False, markup=False)
    return found


def _best(times: Times, gathered: bool) -> tuple[float, dict[str, Any]]:
    found = [(ms, setting) for ms, setting in times if setting.get("GATHERED", False) is gathered]
    ms, setting = min(found, key=lambda entry: entry[0], default=(float("inf"), {}))
    return ms, {key: value for key, value in setting.items() if key != "GATHERED"}


def tuned_settings(found: dict[str, Times], gather: float) -> dict[str, dict[str, Any]]:
    """By kernel. ``gather``: milliseconds of gathering a row for every assignment, which two kernels may share."""
    chosen = {kernel: _best(times, False)[1] for kernel, times in found.items()}
    (swiglu, _), (ready, setting) = _best(found["swiglu"], False), _best(found["swiglu"], True)
    if ready + gather < swiglu:
        chosen["swiglu"] = setting | {"GATHER": False}
    pair = ("swiglu_backward", "d_down")
    if sum(_best(found[kernel], True)[0] for kernel in pair) + gather < sum(_best(found[k], False)[0] for k in pair):
        chosen |= {kernel: _best(found[kernel], True)[1] for kernel in pair}
        chosen["swiglu_backward"] |= {"GATHER": False}
    return chosen


def tuned_layer(problem: Problem, found: dict[str, Times], console: Console) -> dict[str, Any]:
    """Milliseconds of ``moe_mlp`` and its backward, by the settings in force and by the fastest."""
    from cggr_compile.kernels.moe import moe_mlp_backward_triton, moe_mlp_triton
    from cggr_compile.kernels.moe_gather import gather_rows

    gather = _ms(lambda: gather_rows(problem.tokens, problem.order, problem.shape.top_k))
    chosen = tuned_settings(found, gather)
    weights = (problem.tokens, problem.gate_up, problem.down, problem.weights)
    permuted = (problem.order, problem.position, problem.offsets)
    result: dict[str, Any] = {"settings": chosen}
    outcomes: list[list[Tensor]] = []
    for label, overrides in (("in force", {}), ("fastest", chosen)):

        def forward(overrides: dict[str, Any] = overrides) -> tuple[Tensor, Tensor]:
            return moe_mlp_triton(*weights, *permuted, True, overrides)

        out, inner = forward()

        def backward(inner: Tensor = inner, overrides: dict[str, Any] = overrides) -> tuple[Tensor, ...]:
            return moe_mlp_backward_triton(problem.grad, *weights, inner, *permuted, overrides)

        outcomes.append([out, *backward()])
        torch.cuda.reset_peak_memory_stats()
        static = torch.cuda.memory_allocated()
        backward()
        peak = (torch.cuda.max_memory_allocated() - static) / 2**20
        result[label] = dict(forward=_ms(forward), backward=_ms(backward), backward_peak_mb=peak)
        console.print(f"  layer {label}: {result[label]}", highlight=False, markup=False)
    pairs = zip(*outcomes, strict=True)
    result["differences"] = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs]
    console.print(f"  differences {result['differences']}; {chosen}", highlight=False, markup=False)
    return result
