"""Where one step spends its time, by torch.profiler: forward and backward apart, kernel by kernel."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from arms import Step
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaForCausalLM

# the first that matches a kernel's name; matrix products also come as Triton templates (triton_tem_*)
KINDS = {
    "attention": r"flash|fmha|sdpa|attention|dq_kernel|dkv_kernel",
    "matrix product": r"gemm|cutlass|nvjet|cublas|xmma|triton_tem|addmm|::mm|::bmm|mkl",
    "copy, fill": r"memcpy|memset",
    "reduction": r"triton_(red|per|mix)|reduce|softmax",
    "pointwise": r"triton_poi|elementwise",
}


class Row(NamedTuple):
    name: str
    calls: int
    milliseconds: float


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE)), "other")


def profile_step(step: Step, batch: tuple[Tensor, Tensor], model: LlamaForCausalLM, header: str) -> str:
    """A report about one step of a function that is compiled already. On CUDA it lists device kernels, else operators.

    On the CPU, Inductor's own kernels are listed with TORCHINDUCTOR_CPP_ENABLE_KERNEL_PROFILE=1 only.
    """
    device = batch[0].device.type
    model.zero_grad(set_to_none=True)
    torch.compiler.cudagraph_mark_step_begin()
    _profiled(lambda: step(*batch).backward(), device)  # the first session is slow
    model.zero_grad(set_to_none=True)
    torch.compiler.cudagraph_mark_step_begin()
    loss, forward, forward_ms = _profiled(lambda: step(*batch), device)
    _, backward, backward_ms = _profiled(loss.backward, device)
    parts = [header, render("forward", forward, forward_ms), render("backward", backward, backward_ms)]
    return "\n\n".join(parts) + "\n"


def _profiled(call: Callable[[], Any], device: str) -> tuple[Any, list[Row], float]:
    """The call's result, its rows, and milliseconds of the host's clock until the device was done."""
    cuda = device == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiler:
        start = time.perf_counter()
        result = call()
        if cuda:
            torch.cuda.synchronize()
        wall = 1e3 * (time.perf_counter() - start)
    rows = []
    for event in profiler.key_averages():
        on_device = event.device_type != torch.autograd.DeviceType.CPU
        if on_device != cuda or event.is_user_annotation:  # ranges span kernels that are listed themselves
            continue
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        rows.append(Row(str(event.key), event.count, spent / 1e3))
    return result, rows, wall


def render(part: str, rows: list[Row], wall_ms: float, limit: int = 25) -> str:
    """Totals, a table by kind, and the ``limit`` costliest names."""
    kinds: dict[str, Row] = {}
    for row in rows:
        kind = kind_of(row.name)
        _, calls, spent = kinds.get(kind, (kind, 0, 0.0))
        kinds[kind] = Row(kind, calls + row.calls, spent + row.milliseconds)
    total = sum(row.milliseconds for row in rows)
    lines = [
        f"{part}: {sum(row.calls for row in rows)} calls, {total:.2f} ms in them, "
        f"{wall_ms:.2f} ms by the host's clock, profiler included",
        "       ms  share  calls    mean us",
    ]
    for group, count in ((list(kinds.values()), None), (rows, limit)):
        for row in sorted(group, key=lambda row: -row.milliseconds)[:count]:
            share, mean = row.milliseconds / total if total else 0.0, 1e3 * row.milliseconds / row.calls
            lines.append(f"{row.milliseconds:9.3f}  {share:5.1%}  {row.calls:5d}  {mean:9.1f}  {row.name[:150]}")
        lines.append("")
    return "\n".join(lines).rstrip()
