"""Gradients of a compiled training graph, computed beside the training step and without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from cggr_compile import compat
from cggr_compile.passes.analysis.effects import memory, mutated_operands, overlap
from cggr_compile.passes.nodes import fake_value
from cggr_compile.passes.step_interface import Form
from cggr_compile.variance import Gradients

# Much of a float16 gradient is too small to be represented; a training loop has a GradScaler for that.
_FLOAT16_SCALE = 4096.0


@dataclass(frozen=True)
class ProbeRun:
    """Selected positions and their weights, of each forward; differentiable outputs; the gradient of every
    differentiable argument.

    Of a sharded argument it is this process's part of the gradient that all have.

    ``places``: which of the graph's outputs are differentiable.
    """

    selected: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    outputs: list[Tensor]
    grads: list[Tensor | None]
    places: list[int]


class GradientProbe:
    """Runs compiled forms of one rewritten graph on the arguments of a training step.

    ``.grad``, hooks, buffers, the step counter and random generators stay as they are.

    Args:
        graph: the rewritten graph, which takes and returns what ``step_interface`` says; or a dense one, for
            :meth:`gradient`.
        returns: what compiled forms return behind the user's results.
        objective: positions of the outputs that :meth:`gradient` differentiates.

    Attributes:
        returns: as given.
        dtypes: floating-point types that gradients pass through.
        scale: what a gradient is multiplied with, so that it does not vanish in float16.
        names: of the graph's inputs.
    """

    def __init__(self, graph: GraphModule, device: torch.device, returns: Form, objective: Sequence[int] = ()) -> None:
        self.device, self.returns, self._objective = device, returns, objective
        inputs = graph.graph.find_nodes(op="placeholder")
        self.names = [compat.source_name(node) for node in inputs]
        self._written = written_inputs(graph)
        values = [value for value in map(fake_value, graph.graph.nodes) if isinstance(value, Tensor)]
        self.dtypes = {value.dtype for value in values if value.requires_grad}
        self.scale = _FLOAT16_SCALE if torch.float16 in self.dtypes else 1.0

    def run(
        self, function: Callable[..., Any], args: Sequence[Any], step_inputs: Sequence[Tensor], scale: float = 1.0
    ) -> ProbeRun:
        """Gradients of the sum of the outputs, times ``scale`` (and 4096 for float16).

        Random numbers are drawn from the generators as they are now, so two runs draw the same.

        Args:
            args: the compiled graph's arguments without those of ``step_interface``. step_inputs: these.
        """
        with self.apart(), torch.enable_grad():
            fresh = self.fresh(args)
            outputs, others = self.returns.split(function(*fresh, *(value.clone() for value in step_inputs)))
            others = others.clone()  # as in training, nothing but the user's outputs outlives a CUDA graph
            places = [i for i, out in enumerate(outputs) if differentiable(out) and out.numel()]
            roots = [outputs[i] for i in places]
            leaves = [arg for arg in fresh if differentiable(arg)]
            start = [torch.full_like(root, scale * self.scale) for root in roots]
            grads = torch.autograd.grad(roots, leaves, start, allow_unused=True)
            parts = [compat.local_part(grad) for grad in grads]
        return ProbeRun(others.selected, others.weights, [root.detach() for root in roots], parts, places)

    def gradient(self, function: Callable[..., Any], args: Sequence[Any], *step_inputs: Tensor) -> Gradients:
        """Gradients of the objective's sum, of all elements (times 4096 for float16). Zeros where there is none.

        As in :class:`ProbeRun`.

        With CUDA graphs they have to be read before the next compiled call, which may overwrite them.

        Args:
            function: a compiled form of the graph, selective or dense. args: its arguments without those of
                ``step_interface``. step_inputs: these; a dense form has none.
        """
        restart = compat.cuda_graphs_restart(self.device)
        with self.apart(), torch.enable_grad():
            fresh = self.fresh(args)
            outputs, others = self.returns.split(function(*fresh, *step_inputs))
            roots = [outputs[i] for i in self._objective]
            leaves = [arg for arg in fresh if differentiable(arg)]
            start = [torch.full_like(root, self.scale) for root in roots]
            moments = None if others.moments is None else others.moments.clone()
            grads = torch.autograd.grad(roots, leaves, start, materialize_grads=True)
        restart()  # or this, and the step behind it, is a chain of graphs to record
        return Gradients([compat.local_part(grad) for grad in grads], moments)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Random generators return to what they are; saved-tensors hooks see nothing."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), compat.no_saved_tensors_hooks():
            yield

    def fresh(self, args: Sequence[Any]) -> list[Any]:
        """The arguments as leaves of their own, in the same memory; copies of what the graph writes to."""
        return [_alias(arg, written) for arg, written in zip(args, self._written, strict=False)]


def written_inputs(graph: GraphModule) -> list[bool]:
    """For every input of a graph, whether it writes into it."""
    written = [memory(operand) for node in graph.graph.nodes for operand in mutated_operands(node)]
    inputs = [memory(node) for node in graph.graph.find_nodes(op="placeholder")]
    return [any(overlap(operand, own) for operand in written) for own in inputs]


def differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _alias(arg: Any, written: bool) -> Any:
    """The same memory as a leaf of its own, without hooks; a copy where the graph writes into it."""
    if not isinstance(arg, Tensor):
        return arg
    alias = arg.detach().clone() if written else arg.detach()
    return alias.requires_grad_(arg.requires_grad)
