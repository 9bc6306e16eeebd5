"""``verify``: the row-sparse backward against the dense one and the captured graph, on the user's own batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cggr_compile import compat
from cggr_compile.call import Call
from cggr_compile.captured_reference import CapturedReference
from cggr_compile.gradient_probe import GradientProbe, ProbeRun, differentiable
from cggr_compile.options import Options
from cggr_compile.passes.joint.row_sparse import RowSparseBackward
from cggr_compile.report import GraphReport, Verification
from cggr_compile.runtime import Runtime

# Largest difference that rounding explains, in multiples of the rounding that was measured. Tiny models of three
# families, in float32, float16, bfloat16 and under autocast, stay below 2.5 on a CPU and below 12 on an H100.
_ROUNDING = 32.0
_TF32_EPSILON = 2.0**-10
# How far the rewritten graph may be from the captured one, at least and in multiples of the coarsest epsilon. Tiny
# models on a CPU come to 8e-7 in float32, and to 2.5 epsilons in float16, bfloat16 and under autocast.
_CAPTURED, _CAPTURED_EPSILONS = 1e-3, 32.0
# No power of two, so that everything computed from it is rounded differently.
_OTHER_SCALE = 1.3


class VerificationError(RuntimeError):
    """Two backward passes of one graph, or two forms of it, gave what rounding does not explain."""


class Verifier:
    """Compares two compiled forms of one graph on the same arguments, selection and random numbers.

    The error of a gradient is, in Euclidean norms, ``|ours - dense| / max(|dense|, 32 rounding / tolerance)``: its
    relative error, unless rounding alone moves it further than the tolerance. ``rounding`` is measured on the same
    step. A backward pass is linear, so the dense one, started from 1.3 times the loss gradient and divided by 1.3,
    gives the same gradient with every rounding different. Like the error itself this grows with the depth of the
    model and the coarseness of its arithmetic, and a gradient that is zero apart from rounding raises no alarm.

    ``tolerance`` is 1e-5, or twice the machine epsilon of the coarsest floating-point type that gradients pass
    through (the router may compute in a coarser one), or that float32 products are computed in (TF32). What the graph
    returns (the loss) is held to it as well, relative to 1 if it is smaller.

    The first step also compares with the captured graph, which no pass has changed (:class:`CapturedReference`).
    There loss and gradients may differ by a thousandth, or 32 times the coarsest epsilon. A graph that draws random
    numbers is not compared so.

    A comparison runs three forward and backward passes besides the step's own, the first one a fourth. It leaves
    ``.grad``, hooks, buffers, the step counter and random generators alone, and waits for the device.

    Of several processes that train one model (DDP, FSDP2) all raise where one does, in the first ``steps`` steps of the
    training, which all of them compare. A graph that one of them compiles later is that one's own: if it raises there,
    the others wait for its gradients until it ends.

    Args:
        ours, dense: compiled forms of one rewritten graph with the row-sparse pass and without it.
        probe: of the rewritten graph.
        steps: how many to compare; True for all.
        captured: the graph before the passes; dropped after the first step.
    """

    def __init__(
        self,
        ours: Callable[..., Any],
        dense: Callable[..., Any],
        probe: GradientProbe,
        steps: int,
        captured: CapturedReference | None = None,
    ) -> None:
        self.ours, self.dense, self.probe, self.captured = ours, dense, probe, captured
        self.device = device = probe.device
        self.remaining = math.inf if steps is True else steps
        epsilons = [torch.finfo(dtype).eps for dtype in self.probe.dtypes]
        if device.type == "cuda" and compat.multiplies_in_tf32():
            epsilons.append(_TF32_EPSILON)
        self.tolerance = max([1e-5, *(2 * epsilon for epsilon in epsilons)])
        self.captured_tolerance = max([_CAPTURED, *(_CAPTURED_EPSILONS * epsilon for epsilon in epsilons)])

    def step(self, args: Sequence[Any], call: Call, report: GraphReport) -> None:
        """Compare the training step that is about to run; record the outcome.

        Raises:
            VerificationError: if the gradients differ by more than rounding explains.
        """
        self.remaining -= 1
        runtime = call.runtime
        step_inputs = [runtime.state(self.device), *runtime.predictors(self.probe.returns.predictors, self.device)]
        ours = self.probe.run(self.ours, args, step_inputs)
        report.verification = report.verification or Verification(tolerance=self.tolerance)
        if self.captured is not None:
            self._compare_captured(self.captured, args, ours, runtime, report.verification)
        outcome = self.compare(args, step_inputs, ours)
        if isinstance(outcome, str):
            report.verification.note = f"some steps could not be compared: {outcome}"
            runtime.notify(f"verify: a step cannot be compared: {outcome}")
            return
        error, worst = outcome
        report.verification.add(error, worst)
        call.verified(error, worst)
        if error > self.tolerance:
            raise VerificationError(
                f"the row-sparse backward and the dense one differ in {worst}: error {error:.1e}, tolerance "
                f"{self.tolerance:.1e}. This is a bug of cggr_compile; options={{'row_sparse': False}} avoids it"
            )

    def _compare_captured(
        self, captured: CapturedReference, args: Sequence[Any], ours: ProbeRun, runtime: Runtime, found: Verification
    ) -> None:
        self.captured = None  # also if it raises: neither the graph nor what it ran on may stay
        outcome = captured.compare(args, ours, self.probe.scale)
        if isinstance(outcome, str):
            found.note = f"not compared with the captured graph: {outcome}"
            runtime.notify(f"verify: the first step is not compared with the captured graph: {outcome}")
            return
        found.captured_error, worst = outcome
        if found.captured_error > self.captured_tolerance:
            raise VerificationError(
                f"the rewritten graph and the captured one differ in {worst}: error {found.captured_error:.1e}, "
                f"tolerance {self.captured_tolerance:.1e}. This is a bug of cggr_compile; please report it with the "
                "graphs that options={'dump_dir': ...} writes"
            )

    def compare(self, args: Sequence[Any], step_inputs: Sequence[Tensor], ours: ProbeRun) -> tuple[float, str] | str:
        """The largest error and the name of its tensor; or, as one string, why this step cannot be compared.

        Args:
            args: the compiled graph's arguments without those of ``step_interface``. step_inputs: these.
            ours: what the row-sparse form gave.
        """
        dense = self.probe.run(self.dense, args, step_inputs)
        other = self.probe.run(self.dense, args, step_inputs, _OTHER_SCALE)
        same = all(map(torch.equal, dense.selected, ours.selected))
        close = partial(torch.allclose, rtol=self.tolerance / 2, atol=0.0)
        if not same or not all(map(close, dense.weights, ours.weights)):
            return "rounding of the router's scores changed the selection (not so with selection='random')"
        names, figures = [], []
        for i, values in enumerate(zip(ours.outputs, dense.outputs, other.outputs, strict=True)):
            mine, theirs, again = (value.double() for value in values)
            names.append(f"output {i}")
            difference = torch.maximum((mine - theirs).abs().max(), (again - theirs).abs().max())
            figures.append([difference, theirs.abs().max().clamp(min=1.0), torch.zeros_like(difference)])
        leaves = [name for name, arg in zip(self.probe.names, args, strict=False) if differentiable(arg)]
        for name, *grads in zip(leaves, ours.grads, dense.grads, other.grads, strict=True):
            some = next((grad for grad in grads if grad is not None), None)
            if some is not None:
                wide = torch.promote_types(some.dtype, torch.float32)
                mine, theirs, again = (
                    torch.zeros_like(some, dtype=wide) if grad is None else grad.to(wide) for grad in grads
                )
                names.append(name)
                figures.append([(mine - theirs).norm(), theirs.norm(), (again / _OTHER_SCALE - theirs).norm()])
        table = torch.stack([torch.stack([f.double().to(self.device) for f in row]) for row in figures]).tolist()
        if not all(math.isfinite(norm) and math.isfinite(rounding) for _, norm, rounding in table):
            return "the dense backward gave a gradient that is not finite"
        return max((self._error(*row), name) for row, name in zip(table, names, strict=True))

    def _error(self, difference: float, norm: float, rounding: float) -> float:
        if difference == 0.0:
            return 0.0
        allowed = max(norm, _ROUNDING * rounding / self.tolerance)
        return difference / allowed if math.isfinite(difference) and allowed > 0.0 else math.inf


def unverifiable(report: GraphReport, options: Options, device: torch.device) -> str:
    """Why there is nothing to compare for a compiled graph; empty if there is."""
    if not options.row_sparse:
        return "row_sparse is False"
    record = report.record(RowSparseBackward.name)
    if record is not None and record.matched is False:
        return f"the row-sparse pass did not apply: {record.reason}"
    if device.type not in ("cpu", "cuda"):
        return f"the random generators of device {device.type!r} cannot be forked"
    return ""
