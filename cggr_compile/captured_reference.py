"""The captured graph with the loss of the selected positions, run by plain PyTorch: what the rewritten one must be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from cggr_compile import compat
from cggr_compile.gradient_probe import GradientProbe, ProbeRun, differentiable
from cggr_compile.passes.base import GraphContext
from cggr_compile.passes.facts import FinalStates, LossSite, LoweredValues, StaticSizes, TokenValues
from cggr_compile.passes.fx import ancestors, descendants
from cggr_compile.passes.nodes import argument, fake_value
from cggr_compile.passes.patterns.token_values.layout import Layout
from cggr_compile.passes.step_interface import Form

# Share of the whole gradient's norm below which a parameter's own is not told from rounding.
_FLOOR = 1e-3


class CapturedReference:
    """A Dynamo graph before any pass, whose cross-entropies are taken over given positions with given weights.

    Where a loss is made of per-token values, the gradient of the logits is: of every position, what it is times the
    weight, 0 for one that is not selected. Trained tensors that go into the values beside the logits are not compared.

    Nothing else is changed, moved or compiled: logits of all positions are computed, and gradients through all rows.
    That is what a rewritten graph has to give under ``gradient="exact"``, and under ``routed`` to every input from
    which no way to an output passes a place where gradient is stopped: head, final norm, most of the last block.

    Args:
        captured: the graph, left as it is. rewritten: what the passes made of it.
        inputs: the arguments at the capture. ctx: what the passes found.
    """

    def __init__(self, captured: GraphModule, rewritten: GraphModule, inputs: Sequence[Any], ctx: GraphContext) -> None:
        self.captured = captured
        self.losses = [_loss_of(ctx, forward) for forward in ctx.forwards]
        self.kept = tuple(range(len(inputs))) if (static := ctx.get(StaticSizes)) is None else static.kept
        # sizes that have become numbers, and no longer are arguments
        self.sizes = {i: compat.hint(value) for i, value in enumerate(inputs) if i not in self.kept}
        places = captured.graph.find_nodes(op="placeholder")
        unrouted = _unrouted_inputs(rewritten)
        for values in ctx.every(TokenValues):
            unrouted -= {str(node) for node in ancestors(values.beside)}
        # of the rewritten graph's arguments: the name of each whose gradient is the same
        self.names = [compat.source_name(places[i]) if str(places[i]) in unrouted else None for i in self.kept]

    def compare(self, args: Sequence[Any], ours: ProbeRun, scale: float) -> tuple[float, str] | str:
        """The largest error of an output or gradient, and whose; or, as one string, why there is none.

        An output's error is relative to 1 if it is smaller. A gradient's is in Euclidean norms, and relative to a
        thousandth of the whole gradient if it is smaller. ``.grad``, hooks, buffers and random generators stay as
        they are.

        Args:
            args: of the rewritten graph, but for its state. ours: what that graph gave.
            scale: what its gradients are multiplied with.
        """
        whole = list(args)
        for place, size in sorted(self.sizes.items()):
            whole.insert(place, size)
        device = ours.selected[0].device
        probe = GradientProbe(self.captured, device, Form())
        with probe.apart(), torch.enable_grad(), compat.modes_kept():
            before = _generators(device)
            fresh = probe.fresh(whole)
            runs = [loss(*chosen) for loss, *chosen in zip(self.losses, ours.selected, ours.weights, strict=True)]
            try:
                results = _Evaluation(self.captured, runs).run(*fresh)
                if any(run.candidates is None for run in runs):
                    return "its cross-entropy is inside of a checkpoint"
                if any(not torch.equal(*pair) for pair in zip(before, _generators(device), strict=True)):
                    return "it draws random numbers"
                roots = [results[i] for i in ours.places]
                for i, root in zip(ours.places, roots, strict=True):
                    if not differentiable(root):
                        return math.inf, f"output {i}, which has no gradient in the captured graph"
                leaves = [fresh[i] for i in self.kept if differentiable(fresh[i])]
                start = [torch.full_like(root, scale) for root in roots]
                # also without a label: other processes may have some, and wait for this one's part of the gradients
                grads = torch.autograd.grad(roots, leaves, start, allow_unused=True)
                if not any(run.candidates for run in runs):
                    return "no position has a label"
            except torch.OutOfMemoryError:
                return "its logits and activations of all positions do not fit into memory"
        names = [name for name, i in zip(self.names, self.kept, strict=True) if differentiable(fresh[i])]
        return _largest_error(ours, [root.detach() for root in roots], list(map(compat.local_part, grads)), names)


def _loss_of(ctx: GraphContext, forward: int) -> Callable[[Tensor, Tensor], _CrossEntropy | _Gate]:
    """What becomes of the loss of one forward, given the positions and weights of a step."""
    with ctx.of(forward):
        site, begin = ctx[LossSite], ctx[FinalStates].tail_start + ctx[LossSite].start
        heads = ctx.get(LoweredValues) or ctx.get(TokenValues)
    return partial(_CrossEntropy, site, begin) if heads is None else partial(_Gate, heads, begin)


class _CrossEntropy:
    """Takes a cross-entropy over the given positions.

    Args:
        begin: the position of its first row of logits. selected, weights: [B, K], as the graph returns them.

    Attributes:
        candidates: how many that counted; None before, or if the loss is not there.
    """

    def __init__(self, site: LossSite, begin: int, selected: Tensor, weights: Tensor) -> None:
        self.site, self.begin, self.selected, self.weights = site, begin, selected, weights
        self.candidates: int | None = None

    def concerns(self, node: Node) -> bool:
        return str(node) == str(self.site.loss) and node.target is self.site.loss.target

    def value(self, node: Node, evaluation: _Evaluation) -> Tensor:
        logits, target = (evaluation.env[argument(node, i, name)] for i, name in enumerate(("input", "target")))
        return self._loss(logits, target).to(fake_value(node).dtype)

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """The selected losses' weighted sum, divided as the rewritten graph does."""
        found, selected = self.site, self.selected
        wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        kind = {"ignore_index": found.ignore_index, "label_smoothing": found.label_smoothing}
        each = F.cross_entropy(wide, target, reduction="none", **kind).reshape(len(selected), -1)  # type: ignore[arg-type]
        valid = (target != found.ignore_index).reshape(each.shape)
        unused = selected < 0
        column = torch.where(unused, 0, selected - self.begin)
        counts = torch.zeros_like(each).scatter_add(1, column, torch.where(unused, 0.0, self.weights).to(each.dtype))
        self.candidates, total = int(valid.sum()), (each * counts).sum()
        return total / max(self.candidates, 1) if found.reduction == "mean" else total


class _Gate:
    """Gives the logits of some heads a gradient at the given positions only, times their weights.

    Args:
        begin: the position of the hidden state's first row. selected, weights: [B, K], as the graph returns them.

    Attributes:
        candidates: how many are selected; None before.
    """

    def __init__(self, found: TokenValues | LoweredValues, begin: int, selected: Tensor, weights: Tensor) -> None:
        self.begin, self.selected, self.weights = begin, selected, weights
        self.layouts = {str(head): layout for head, layout in zip(found.heads, found.head_layouts, strict=True)}
        self.candidates: int | None = None

    def concerns(self, node: Node) -> bool:
        return str(node) in self.layouts

    def value(self, node: Node, evaluation: _Evaluation) -> Any:
        value = evaluation.as_captured(node)
        self.candidates = int((self.selected >= 0).sum())
        factors = self._factors(self.layouts[str(node)])
        if isinstance(value, Tensor):
            return _times(value, factors)
        return tuple(_times(each, factors) if each.numel() else each for each in value)

    def _factors(self, layout: Layout) -> Tensor:
        """The weights of the positions that logits have, in their shape."""
        window, selected = layout.window, self.selected
        begin = self.begin + window.start
        length = begin + window.length
        column = torch.where((selected < 0) | (selected >= length), length, selected)
        whole = selected.new_zeros(len(selected), length + 1, dtype=torch.float32)
        whole = whole.scatter(1, column, self.weights)[:, begin:length]
        whole = whole[window.first : window.first + window.count]
        if not layout.flat:
            return whole.reshape(*whole.shape, *[1] * len(layout.features))
        rows = whole.flatten()[window.begin : window.begin + window.size]
        return rows.reshape(-1, *[1] * len(layout.features))


class _Evaluation(Interpreter):
    """Runs a graph with other losses, or logits."""

    def __init__(self, graph: GraphModule, losses: Sequence[_CrossEntropy | _Gate]) -> None:
        super().__init__(graph)
        self.losses = losses

    def run_node(self, n: Node) -> Any:
        loss = next((loss for loss in self.losses if loss.concerns(n)), None)
        return self.as_captured(n) if loss is None else loss.value(n, self)

    def as_captured(self, n: Node) -> Any:
        return super().run_node(n)


def _times(value: Tensor, factors: Tensor) -> Tensor:
    """The value, with its gradient times factors."""
    return value.detach() + (value - value.detach()) * factors.to(value.dtype)


def _unrouted_inputs(rewritten: GraphModule) -> set[str]:
    """The inputs of a semantic graph from which no way to an output passes a marker that stops gradient."""
    stop = torch.ops.cggr.detach_unselected.default
    inputs = rewritten.graph.find_nodes(op="placeholder")
    return {str(node) for node in inputs if all(n.target is not stop for n in descendants([node]))}


def _generators(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _largest_error(
    ours: ProbeRun, outputs: list[Tensor], grads: list[Tensor | None], names: list[str | None]
) -> tuple[float, str] | str:
    """Of the outputs, and of the gradients that have a name."""
    whole = math.sqrt(sum(_norm(grad) ** 2 for grad in grads if grad is not None))
    if not all(map(math.isfinite, [whole, *map(_norm, outputs)])):
        return "it gave a gradient that is not finite"
    found = [
        (_ratio(_norm(mine - theirs), max(_norm(theirs), 1.0)), f"output {i}")
        for i, mine, theirs in zip(ours.places, ours.outputs, outputs, strict=True)
    ]
    for name, mine, theirs in zip(names, ours.grads, grads, strict=True):
        if name is None or (mine is None and theirs is None):
            continue
        size = 0.0 if theirs is None else _norm(theirs)
        wide = [grad.double() for grad in (mine, theirs) if grad is not None]
        difference = _norm(wide[0] - wide[1]) if len(wide) == 2 else _norm(wide[0])
        found.append((_ratio(difference, max(size, _FLOOR * whole)), name))
    return max(found)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64))


def _ratio(difference: float, allowed: float) -> float:
    if difference == 0.0:
        return 0.0
    return difference / allowed if math.isfinite(difference) and allowed else math.inf
