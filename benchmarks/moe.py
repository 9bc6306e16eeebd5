"""Times one Mixture-of-Experts layer, route to un-permuted output, forward and backward.

The arms (see moe_arms.py) share weights and tokens and take turns, one step each in every round; figures are medians
over the rounds, and so are the ratios, `grouped_mm` over the arm within a round: how many times faster. The forward
keeps what the backward needs; the backward computes the gradients of tokens, router and experts. Before anything is
timed, the arms' outputs and gradients are compared. Peak memory is over what is allocated between steps.

    python benchmarks/moe.py                              # CUDA, both shapes
    python benchmarks/moe.py --compile                    # every arm through torch.compile (Inductor)
    python benchmarks/moe.py --max-autotune               # the same; Inductor times how to compute each step
    python benchmarks/moe.py --rows 0.25 0.05             # instead: the backward from a share of the rows (moe_rows.py)
    python benchmarks/moe.py --compile --profile          # and the kernels of a step, with their times
    python benchmarks/moe.py --sweep --jobs 16            # settings of our grouped products, best first
    python benchmarks/moe.py --tiny                       # CPU, float32: a rehearsal
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import moe_rows
import torch
from machine import describe
from moe_arms import ARMS, BASELINE, ROUTED, SHAPES, Layer, build_arm, build_weights, clear_choices
from results import PARTS, machine_line, save, summary, text, times_faster, value
from rich.console import Console
from rich.table import Table
from timing import MB, Sample, milliseconds, stamp
from torch import Tensor

from cggr_compile import lowerings

WARM_UP = 3
PROFILED = 25  # kernels that are listed
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # relative, in norm


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    real = [name for name in SHAPES if name != "tiny"]
    parser.add_argument("--shapes", nargs="+", choices=real, default=real)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--repeats", type=int, default=30, help="rounds")
    parser.add_argument("--compile", action="store_true", help="torch.compile every arm")
    parser.add_argument("--max-autotune", action="store_true", help="the same under max-autotune")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/moe.json"))
    parser.add_argument("--profile", action="store_true", help="list the kernels of a step of every arm, too")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU, float32")
    parser.add_argument("--rows", type=float, nargs="+", help="time the backward from these shares of the rows instead")
    parser.add_argument("--sweep", action="store_true", help="try tile sizes instead; writes <json>-sweep.json")
    parser.add_argument("--kernels", nargs="+", help="of --sweep: these only")
    parser.add_argument("--jobs", type=int, default=1, help="of --sweep: processes that compile")
    args = parser.parse_args(argv)
    if args.repeats < 1 or args.jobs < 1:
        parser.error("--repeats and --jobs must be at least 1")
    if args.rows and not all(0 < share < 1 for share in args.rows):
        parser.error(f"--rows must be in (0, 1), got {args.rows}")
    if args.tiny and args.sweep:
        parser.error("--sweep needs a CUDA device: leave out --tiny")
    if not args.tiny and not torch.cuda.is_available():
        parser.error("this torch sees no CUDA device: --tiny rehearses on the CPU")
    args.device, args.dtype = ("cpu", torch.float32) if args.tiny else ("cuda", torch.bfloat16)
    args.shapes = ["tiny"] if args.tiny else args.shapes
    args.how = "max-autotune" if args.max_autotune else "compiled" if args.compile else "eager"
    return args


class Case:
    """One shape: tokens, an upstream gradient, weights, and the arms on them."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        torch._dynamo.reset()
        self.name, self.args, self.shape = name, args, SHAPES[name]
        self.cuda = args.device == "cuda"
        self.layer = build_weights(self.shape, args.device, args.dtype)
        make = dict(device=args.device, dtype=args.dtype)
        self.hidden = torch.randn(self.shape.tokens, self.shape.hidden, **make).requires_grad_()
        self.grad = torch.randn_like(self.hidden)
        # the dense arm's rows lie ready
        many = self.shape.tokens * self.shape.top_k
        self.rows = torch.randn(many, self.shape.hidden, **make).requires_grad_()
        self.rows_grad = torch.randn_like(self.rows)
        self.records: dict[str, dict[str, Any]] = {}
        self.layers: dict[str, Layer] = {}

    def inputs(self, arm: str) -> tuple[Tensor, Tensor]:
        return (self.rows, self.rows_grad) if arm == "dense" else (self.hidden, self.grad)

    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.rows, *self.layer.parameters()]

    def step(self, arm: str, *, lead_in: bool = False) -> Sample:
        """One forward and backward. ``lead_in``: one more before, unmeasured, so that the device has a queue."""
        function, (tokens, upstream) = self.layers[arm], self.inputs(arm)
        cuda = self.cuda
        if lead_in:
            self.clear()
            function(tokens).backward(upstream)
        self.clear()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        static = torch.cuda.memory_allocated() if cuda else 0
        start = stamp(self.args.device)
        out = function(tokens)
        middle = stamp(self.args.device)
        out.backward(upstream)
        end = stamp(self.args.device)
        if cuda:
            torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - static) / MB if cuda else None
        forward, backward = milliseconds(start, middle), milliseconds(middle, end)
        return Sample(forward, backward, forward + backward, 0.0, peak, None)

    def clear(self) -> None:
        for leaf in self.leaves():
            leaf.grad = None

    def prepare(self, arm: str) -> None:
        layer = build_arm(arm, self.layer)
        if self.args.how != "eager":
            lowerings.register()  # as the backend does
            layer = torch.compile(layer, mode="max-autotune-no-cudagraphs" if self.args.max_autotune else None)
        self.layers[arm] = layer
        for _ in range(WARM_UP):
            self.step(arm)

    def outcome(self, arm: str) -> list[Tensor]:
        """Output and gradients where the choice of experts is clear."""
        clear = clear_choices(self.layer, self.hidden.detach())[:, None]
        self.clear()
        out = self.layers[arm](self.hidden)
        out.backward(self.grad * clear)
        found = [out.detach() * clear, self.hidden.grad, *(p.grad for p in self.layer.parameters())]
        return [tensor.double() for tensor in found if tensor is not None]


def kernels(case: Case, arm: str) -> list[tuple[str, int, float]]:
    """(name, launches, milliseconds) of every kernel of a step, the longest first."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA][: 1 + case.cuda]
    with torch.profiler.profile(activities=activities) as profile:
        case.step(arm)
    device = torch.autograd.DeviceType.CUDA if case.cuda else torch.autograd.DeviceType.CPU
    events = [event for event in profile.key_averages() if event.device_type == device]
    total = [(e.key, e.count, (e.self_device_time_total if case.cuda else e.self_cpu_time_total) / 1e3) for e in events]
    return sorted(total, key=lambda entry: -entry[2])


def disagreement(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative difference, in norm, among output and gradients."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))


def measure(name: str, args: argparse.Namespace, document: dict[str, Any], console: Console) -> None:
    """Appends the result of one shape to the document."""
    case = Case(name, args)
    result: dict[str, Any] = {"shape": name, **vars(case.shape), "flops": case.shape.flops}
    result |= {"how": args.how, "dtype": str(args.dtype), "rounds": 0, "arms": case.records}
    document["results"].append(result)
    reference, wanted = "", []
    for arm in args.arms:
        try:
            case.prepare(arm)
            case.records[arm] = {"status": "ok"}
            if arm in ROUTED:
                found = case.outcome(arm)
                if not reference:
                    reference, wanted = arm, found
                case.records[arm]["difference"] = error = disagreement(found, wanted)
                if not error <= TOLERANCE[args.dtype]:
                    raise RuntimeError(f"not the function that {reference} computes: {error:.1e} off")
        except RuntimeError as error:
            case.records[arm] = {"status": "failed", "error": f"{type(error).__name__}: {error}"}
            case.layers.pop(arm, None)
            console.print(f"{name} {arm}: {case.records[arm]['error']}", highlight=False, markup=False)
    del wanted
    samples: dict[str, list[Sample]] = {arm: [] for arm in case.layers}
    for _ in range(args.repeats):
        for arm in case.layers:
            samples[arm].append(case.step(arm, lead_in=args.device == "cuda"))
        result["rounds"] += 1
    for arm in case.layers:
        record = case.records[arm]
        record |= summary(samples[arm], case.shape.tokens)
        record["tflops"] = case.shape.flops / record["forward"]["median"] / 1e9
        if args.profile:
            record["kernels"] = kernels(case, arm)
            console.print(f"{name} {arm}: {sum(count for _, count, _ in record['kernels'])} launches", highlight=False)
            for kernel, count, ms in record["kernels"][:PROFILED]:
                console.print(f"  {ms:8.3f} ms  {count:3d}  {kernel[:100]}", highlight=False, markup=False)
    save(document, args.json)


def table(result: dict[str, Any]) -> Table:
    found = Table(title=f"{result['shape']}, {result['tokens']} tokens, {result['how']}", title_justify="left")
    found.add_column("arm")
    for column in ("fwd ms", "bwd ms", "step ms", "fwd ×", "bwd ×", "step ×", "fwd TFLOP/s", "peak MB", "difference"):
        found.add_column(column, justify="right")
    for arm, record in result["arms"].items():
        if record["status"] != "ok":
            found.add_row(arm, record["error"][:60])
            continue
        found.add_row(
            arm,
            *(text(value(result, arm, part), "{:.3f}") for part in PARTS),
            *(text(times_faster(result, BASELINE, arm, part), "{:.2f}") for part in PARTS),
            text(record["tflops"], "{:.0f}"),
            text(record["peak_mb"], "{:.0f}"),
            text(record.get("difference"), "{:.0e}"),
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    console = Console(width=max(140, Console().width))
    if args.sweep:
        from moe_sweep import sweep

        sweep(args, console)
        return 0
    document: dict[str, Any] = {"machine": describe(args.device), "results": []}
    console.print(machine_line(document["machine"]), highlight=False)
    if args.rows:
        for name in args.shapes:
            document["results"].append(moe_rows.measure(name, args))
            save(document, args.json)
            console.print(moe_rows.table(document["results"][-1]))
        return 0
    for name in args.shapes:
        measure(name, args, document, console)
        console.print(table(document["results"][-1]))
    return int(any(arm["status"] != "ok" for result in document["results"] for arm in result["arms"].values()))


if __name__ == "__main__":
    sys.exit(main())
