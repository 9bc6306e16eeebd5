"""Programs with calls of ``cggr::token_log_probs`` in place of logits and of what is computed from them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.fx.node import map_aggregate

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile.passes.nodes import fake_value
from cggr_compile.passes.patterns.head import read_head
from cggr_compile.passes.patterns.token_values.known import Known, Logits, Reading
from cggr_compile.passes.patterns.token_values.program import INLINE, Call, Program, Ref, Size, Taken
from cggr_compile.passes.patterns.token_values.rules.head_values import NO_LABEL

if TYPE_CHECKING:
    from torch.fx import Node

Box = tuple[slice, slice, tuple[int, int, int, int]]  # of sequences, of positions, how many lie outside

_OUTPUTS = ("log_prob", "entropy", "logsumexp", "log_sum_squares", "mean_logit")


def _first(value: Any) -> Any:
    return value


def _prob(log_prob: Any) -> Any:
    return log_prob.exp()


def _label_logit(log_prob: Any, logsumexp: Any) -> Any:
    return log_prob + logsumexp


def _negative_entropy(entropy: Any) -> Any:
    return -entropy


def _expected_logit(logsumexp: Any, entropy: Any) -> Any:
    return logsumexp - entropy


def _sum_logits(mean_logit: Any, size: int) -> Any:
    return mean_logit * size


def _sum_log_probs(mean_logit: Any, logsumexp: Any, size: int) -> Any:
    return (mean_logit - logsumexp) * size


def _smoothed(log_prob: Any, mean_logit: Any, logsumexp: Any, smoothing: float) -> Any:
    return (logsumexp - mean_logit) * smoothing - log_prob * (1.0 - smoothing)


# Of each value, the outputs of the operator that it is computed from, the numbers that it takes, and how.
_FORMULAS: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[..., Any]]] = {
    "log_prob": (("log_prob",), (), _first),
    "prob": (("log_prob",), (), _prob),
    "label_logit": (("log_prob", "logsumexp"), (), _label_logit),
    "logsumexp": (("logsumexp",), (), _first),
    "negative_entropy": (("entropy",), (), _negative_entropy),
    "expected_logit": (("logsumexp", "entropy"), (), _expected_logit),
    "sum_logits": (("mean_logit",), ("size",), _sum_logits),
    "sum_log_probs": (("mean_logit", "logsumexp"), ("size",), _sum_log_probs),
    "sum_squares": (("log_sum_squares",), (), _prob),
    "smoothed": (("log_prob", "mean_logit", "logsumexp"), ("smoothing",), _smoothed),
}


def _at_labels(value: Any, labelled: Any) -> Any:
    return torch.where(labelled, value, 0.0)


def _labelled(labels: Any, size: int, ignored: int) -> Any:
    return (labels >= 0) & (labels < size) & (labels != ignored)


def _filled(labels: Any, labelled: Any) -> Any:
    return torch.where(labelled, labels, 0)


def _without_ignored(labels: Any, ignored: int) -> Any:
    return torch.where(labels == ignored, NO_LABEL, labels)


def _inside_box(labels: Any, box: Box) -> Any:
    sequences, positions, outside = box
    return F.pad(labels[sequences, positions], outside, "constant", NO_LABEL)


def with_calls(
    program: Program,
    read: Reading,
    heads: Mapping[Ref, Node],
    place: Callable[[Node], int],
    bring: Callable[[Node], Node],
    within: Callable[[Logits], Box | None],
) -> tuple[Program, dict[Ref, Ref], list[Ref]]:
    """The program without logits, where each of its steps is now, and the calls that have a label everywhere.

    A head's call stands where the head is.

    Args:
        heads: the products that make logits, by their steps. place: of a node in the graph.
        bring: labels to where they can be read in front of all heads.
        within: outside of these sequences and positions no label is needed; None: everywhere is one.
    """
    writer = _Writer(program, read, heads, place, bring, within)
    for number in read.steps:
        writer.step(number)
    return writer.made, writer.now, writer.everywhere


class _Writer:
    def __init__(
        self,
        program: Program,
        read: Reading,
        heads: Mapping[Ref, Node],
        place: Callable[[Node], int],
        bring: Callable[[Node], Node],
        within: Callable[[Logits], Box | None],
    ) -> None:
        self.program, self.read, self.heads, self.bring, self.within = program, read, heads, bring, within
        self.made = Program(place)
        self.now: dict[Ref, Ref] = {}
        self.everywhere: list[Ref] = []
        self._calls: dict[Logits, tuple[Ref, Ref | None]] = {}

    def step(self, number: int) -> None:
        step, anchor, ref = self.program.steps[number], self.program.anchors[number], Ref(number)
        if number in self.read.values:
            self.now[ref] = self._value(self.read.values[number], anchor)
        elif number not in self.read.entries:
            if isinstance(step, Call):
                now = self.now
                args, kwargs = map_aggregate((step.args, step.kwargs), lambda v: now[v] if isinstance(v, Ref) else v)
                step = replace(step, args=args, kwargs=dict(kwargs))
            self.now[ref] = self.made.add(step, anchor, number)  # the same in other modes is another

    def _value(self, known: Known, anchor: Node) -> Ref:
        names, numbers, formula = _FORMULAS[known.name]
        call, labelled = self._call(known.logits)
        outputs = [self._add(anchor, "call_function", operator.getitem, call, _OUTPUTS.index(name)) for name in names]
        given = {"size": known.logits.size, "smoothing": known.smoothing}
        (value,) = (
            outputs
            if formula is _first
            else (self._add(anchor, INLINE, formula, *outputs, *(given[name] for name in numbers)),)
        )
        if known.factor != 1.0:
            value = self._add(anchor, "call_function", operator.mul, value, known.factor)
        if known.label is not None and labelled is not None:
            value = self._add(anchor, INLINE, _at_labels, value, labelled)
        if known.keep:
            value = self._add(anchor, "call_method", "reshape", value, Size.BATCH, Size.ROWS, 1)
        return value

    def _add(self, anchor: Node, op: str, target: Any, *args: Any, **kwargs: Any) -> Ref:
        return self.made.add(Call(op, target, args, kwargs), anchor, None)

    def _call(self, logits: Logits) -> tuple[Ref, Ref | None]:
        """The operator's call, and where there is a label, if it is given some everywhere else as well."""
        if logits not in self._calls:
            self._calls[logits] = self._new_call(logits)
        return self._calls[logits]

    def _new_call(self, logits: Logits) -> tuple[Ref, Ref | None]:
        anchor, head = self.program.anchors[logits.head.number], self.heads[logits.head]
        label, everywhere = self.read.label(logits), self.read.everywhere(logits)
        labels, labelled = self._labels(logits, anchor)
        hidden, weight, bias = self._operands(logits, head, anchor)
        wanted = {name for known in self.read.of(logits) for name in _FORMULAS[known.name][0]}
        all_labelled = everywhere or label is None or label.ignored is None
        call = self._add(
            anchor,
            "call_function",
            torch.ops.cggr.token_log_probs.default,
            *(hidden, weight, bias, labels, None, None, None, logits.scale, logits.softcap),
            *("log_sum_squares" in wanted, "mean_logit" in wanted, not all_labelled),
        )
        if all_labelled:
            self.everywhere.append(call)
        return call, labelled

    def _labels(self, logits: Logits, anchor: Node) -> tuple[Ref, Ref | None]:
        """Of each row, [B, K]; and where there is one, if they are filled up."""
        label, box = self.read.label(logits), self.within(logits)

        def bounded(labels: Ref) -> Ref:
            return labels if box is None else self._add(anchor, INLINE, _inside_box, labels, box)

        if label is None:
            shape, device = (Size.BATCH, Size.ROWS), fake_value(logits.weight).device
            zeros = self._add(anchor, "call_function", torch.zeros, shape, dtype=torch.int64, device=device)
            return bounded(zeros), None
        taken = self.program.steps[label.taken.number]
        assert isinstance(taken, Taken)
        labels = self.made.add(replace(taken, node=self.bring(taken.node)), anchor, None)
        if taken.layout.features:
            labels = self._add(anchor, "call_method", "reshape", labels, Size.BATCH, Size.ROWS)
        labels = bounded(labels)
        if label.ignored is None:
            return labels, None
        if self.read.everywhere(logits):
            labelled = self._add(anchor, INLINE, _labelled, labels, logits.size, label.ignored)
            return bounded(self._add(anchor, INLINE, _filled, labels, labelled)), labelled
        return labels if label.ignored < 0 else self._add(anchor, INLINE, _without_ignored, labels, label.ignored), None

    def _operands(self, logits: Logits, head: Node, anchor: Node) -> tuple[Any, Any, Any]:
        """In the dtype that the head multiplies in: autocast's, where it runs under it."""
        weight: Any = logits.weight
        if logits.transposed:
            weight = self._add(anchor, "call_method", "t", weight)
        operands = [self.now[logits.hidden], weight, logits.bias]
        if logits.size != fake_value(head).shape[-1]:
            kept = slice(logits.begin, logits.begin + logits.size)
            operands[1:] = [
                None if node is None else self._add(anchor, "call_function", operator.getitem, node, kept)
                for node in operands[1:]
            ]
        dtype, sources = fake_value(head).dtype, (read_head(head)[0], logits.weight, logits.bias)
        operands = [
            operand
            if operand is None or fake_value(source).dtype == dtype
            else self._add(anchor, "call_method", "to", operand, dtype)
            for operand, source in zip(operands, sources, strict=True)
        ]
        return operands[0], operands[1], operands[2]
