"""Reads of a program which values are those of ``cggr::token_log_probs``: of one softmax, or of one class out of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from cggr_compile.passes.nodes import bare_name, fake_value, shape_of
from cggr_compile.passes.patterns.head import CASTS
from cggr_compile.passes.patterns.token_values.program import INLINE, Call, Constant, Program, Ref, Size, Taken, refs_of
from cggr_compile.passes.patterns.token_values.rules.losses import by_rows, known_labels

if TYPE_CHECKING:
    from torch.fx import Node

# What is known of an entry per class: logits z, log-softmax, softmax p, and the products of p with these three.
LOGITS, LOG_PROBS, PROBS, P_LOGITS, P_LOG_PROBS, P_PROBS = "z", "log p", "p", "p z", "p log p", "p p"
_PRODUCTS = {LOGITS: P_LOGITS, LOG_PROBS: P_LOG_PROBS, PROBS: P_PROBS}
_SUMS = {
    LOGITS: "sum_logits",
    LOG_PROBS: "sum_log_probs",
    P_LOGITS: "expected_logit",
    P_LOG_PROBS: "negative_entropy",
    P_PROBS: "sum_squares",
}
_PICKS = {LOGITS: "label_logit", LOG_PROBS: "log_prob", PROBS: "prob"}
_CLASSES = 2  # the axis of [B, K, V]


class NotKnownError(Exception):
    """Why values are others than those of the operator, in words that follow "the logits"."""


@dataclass(frozen=True)
class Logits:
    """``z = softcap * tanh(scale * (h W^T + b) / softcap)``, without tanh where ``softcap`` is 0.

    Attributes:
        head: the step of the product. hidden: what it multiplies.
        size: how many classes there are. begin: the first of those of the weight; the others are cut off.
    """

    head: Ref
    hidden: Ref
    weight: Node
    bias: Node | None
    transposed: bool
    size: int
    begin: int = 0
    scale: float = 1.0
    softcap: float = 0.0


@dataclass(frozen=True)
class Entries:
    """An entry per class, [B, K, V]: ``factor`` times what ``kind`` names."""

    logits: Logits
    kind: str
    factor: float = 1.0


@dataclass(frozen=True)
class Label:
    """A class per position. ``ignored``: the one that stands for none; None: every position has one."""

    taken: Ref
    ignored: int | None


@dataclass(frozen=True)
class Known:
    """A value per position: ``factor`` times what ``name`` names, [B, K, 1] with ``keep``, else [B, K]."""

    logits: Logits
    name: str
    label: Label | None = None
    keep: bool = False
    factor: float = 1.0
    smoothing: float = 0.0


@dataclass
class Reading:
    """What was read of the steps that some values need, by their numbers.

    Attributes:
        entries: steps with an axis over the classes. values: those that the operator computes in place of others.
    """

    steps: list[int]
    entries: dict[int, Entries] = field(default_factory=dict)
    values: dict[int, Known] = field(default_factory=dict)

    def of(self, logits: Logits) -> list[Known]:
        return [known for known in self.values.values() if known.logits == logits]

    def label(self, logits: Logits) -> Label | None:
        """The class per position that values of these logits are of."""
        return next((known.label for known in self.of(logits) if known.label is not None), None)

    def everywhere(self, logits: Logits) -> bool:
        """Whether values of these logits are taken at positions without a label as well."""
        return any(known.label is None for known in self.of(logits))


def read_program(program: Program, refs: list[Ref], heads: Mapping[Ref, Node]) -> Reading:
    """The values of a program, if the operator computes all that are taken of its logits, with one call for each head.

    Args:
        heads: the products that make logits, by their steps.

    Raises:
        NotKnownError: it does not.
    """
    reader = _Reader(program, heads, Reading(program.needed(refs)))
    for number in reader.found.steps:
        reader.step(number)
    found = reader.found
    if any(ref.number in found.entries for ref in refs):
        raise NotKnownError("leave with an axis over the vocabulary")
    seen: dict[Ref, Logits] = {}
    for known in found.values.values():
        if seen.setdefault(known.logits.head, known.logits) != known.logits:
            raise NotKnownError("are read with two scales")
        if known.label is not None and known.label != found.label(known.logits):
            raise NotKnownError("are read for two classes at a position")
    return found


class _Reader:
    def __init__(self, program: Program, heads: Mapping[Ref, Node], found: Reading) -> None:
        self.program, self.heads, self.found = program, heads, found

    def step(self, number: int) -> None:
        step, found = self.program.steps[number], self.found
        if Ref(number) in self.heads:
            found.entries[number] = self._head(Ref(number), step)
            return
        if not isinstance(step, Call) or not any(ref.number in found.entries for ref in refs_of(step)):
            self._view_of_value(number, step)
            return
        name = bare_name(step.op, step.target)
        rule = _RULES.get(name)
        read = rule(self, name, step) if rule is not None else None
        if isinstance(read, Entries) and math.isfinite(read.factor):
            found.entries[number] = read
        elif isinstance(read, Known):
            found.values[number] = read
        else:
            raise NotKnownError(f"are read by {name!r}")

    def _head(self, ref: Ref, step: Any) -> Entries:
        node = self.heads[ref]
        if not isinstance(step, Call) or fake_value(node).dtype not in _FLOATS:
            raise NotKnownError(f"are made by {node}")
        linear = bare_name(step.op, step.target) == "linear"
        hidden = step.args[0] if step.args else step.kwargs.get("input")
        weight = step.args[1] if len(step.args) > 1 else step.kwargs.get("weight" if linear else "other")
        bias = step.args[2] if len(step.args) > 2 else step.kwargs.get("bias")
        if not isinstance(hidden, Ref) or len(shape_of(weight)) != 2:
            raise NotKnownError(f"are made by {node}")
        size = shape_of(weight)[0 if linear else 1]
        return Entries(Logits(ref, hidden, weight, bias, not linear, size), LOGITS)  # type: ignore[arg-type]

    def _view_of_value(self, number: int, step: Any) -> None:
        """A known value with another axis of size 1: ``lse.unsqueeze(-1)``."""
        if not isinstance(step, Call) or step.target != "reshape" or not step.args:
            return
        known = self.found.values.get(step.args[0].number) if isinstance(step.args[0], Ref) else None
        features = step.args[3:]
        if known is not None and features in ((), (1,)):
            self.found.values[number] = replace(known, keep=bool(features))

    def entries(self, value: Any) -> Entries | None:
        return self.found.entries.get(value.number) if isinstance(value, Ref) else None

    def value(self, value: Any) -> Known | None:
        return self.found.values.get(value.number) if isinstance(value, Ref) else None

    def called(self, value: Any, name: str, op: str = "call_method") -> Call | None:
        """The step of a call of this name; of an inlined function, of this function's."""
        step = self.program.steps[value.number] if isinstance(value, Ref) else None
        return step if isinstance(step, Call) and step.op == op and bare_name(op, step.target) == name else None

    def label(self, index: Any) -> Label | None:
        """The label that an index [B, K, 1] names, which rules of picks have clamped."""
        while (call := self.called(index, "clamp") or self.called(index, "reshape")) is not None:
            if call.target == "reshape" and call.args[1:] not in ((*_POSITIONS,), (*_POSITIONS, 1)):
                return None
            if call.target == "clamp" and call.args[1] != 0:
                return None
            index = call.args[0]
        return Label(index, None) if self._one_class(index) else None

    def _one_class(self, ref: Any) -> bool:
        taken = self.program.steps[ref.number] if isinstance(ref, Ref) else None
        if not isinstance(taken, Taken) or any(size != 1 for size in taken.layout.features):
            return False
        dtype = fake_value(taken.node).dtype
        return len(taken.layout.features) < 2 and dtype in (torch.int64, torch.int32)

    def ignoring(self, target: Any) -> Label | None:
        """The label that a target of a loss names, which the rule of losses has bounded."""
        call = self.called(target, known_labels.__name__, INLINE)
        if call is None or not self._one_class(call.args[0]):
            return None
        return Label(call.args[0], int(call.args[2]))


_POSITIONS = (Size.BATCH, Size.ROWS)
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_Rule = Callable[[_Reader, str, Call], "Entries | Known | None"]
_RULES: dict[str, _Rule] = {}


def _rule(*names: str) -> Callable[[_Rule], _Rule]:
    def register(function: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _argument(step: Call, position: int, name: str, default: Any = None) -> Any:
    return step.args[position] if len(step.args) > position else step.kwargs.get(name, default)


def _of_classes(step: Call, axes: Any) -> bool:
    """Whether a call along axes works on that of the classes."""
    return axes in (_CLASSES, (_CLASSES,), [_CLASSES])


@_rule(*CASTS)
def _cast(reader: _Reader, name: str, step: Call) -> Entries | None:
    """The operator computes in float32, of float64 in float64."""
    read = reader.entries(step.args[0])
    given = [*step.args[1:], *step.kwargs.values()]
    dtypes = [value for value in given if isinstance(value, torch.dtype)]
    others = [fake_value(value).dtype for value in given if hasattr(value, "meta")]
    head = fake_value(reader.heads[read.logits.head]).dtype if read is not None else None
    wide = name == "double" or torch.float64 in (*dtypes, *others)
    exact = not wide or head == torch.float64
    return read if exact and all(dtype.is_floating_point for dtype in (*dtypes, *others)) else None


@_rule("neg")
def _negated(reader: _Reader, name: str, step: Call) -> Entries | None:
    return _scaled(reader.entries(step.args[0]), -1.0)


def _scaled(read: Entries | None, factor: float) -> Entries | None:
    """``factor`` times these. Of logits that is another softmax."""
    if read is None or not math.isfinite(factor) or not factor:
        return None
    if read.kind != LOGITS:
        return replace(read, factor=read.factor * factor)
    z = read.logits
    if factor < 0.0:
        return None
    return replace(read, logits=replace(z, scale=z.scale * factor, softcap=z.softcap * factor))


@_rule("mul", "div")
def _product(reader: _Reader, name: str, step: Call) -> Entries | None:
    if len(step.args) != 2 or step.kwargs:
        return None
    one, other = step.args
    left, right = reader.entries(one), reader.entries(other)
    if left is None or right is None:
        number = other if left is not None else one
        if isinstance(number, bool) or not isinstance(number, (int, float)) or (name == "div" and left is None):
            return None
        return _scaled(left or right, float(number) if name == "mul" else 1.0 / number if number else 0.0)
    if name == "div" or left.logits != right.logits:
        return None
    if left.kind != PROBS:
        left, right = right, left
    if left.kind != PROBS or right.kind not in _PRODUCTS:
        return None
    return Entries(left.logits, _PRODUCTS[right.kind], left.factor * right.factor)


@_rule("square", "pow")
def _square(reader: _Reader, name: str, step: Call) -> Entries | None:
    read = reader.entries(step.args[0])
    if read is None or read.kind != PROBS or (name == "pow" and _argument(step, 1, "exponent") != 2):
        return None
    return Entries(read.logits, P_PROBS, read.factor * read.factor)


@_rule("tanh")
def _soft_cap(reader: _Reader, name: str, step: Call) -> Entries | None:
    read = reader.entries(step.args[0])
    if read is None or read.kind != LOGITS or read.logits.softcap:
        return None
    return replace(read, logits=replace(read.logits, softcap=1.0))


@_rule("add")
def _bias(reader: _Reader, name: str, step: Call) -> Entries | None:
    """A bias that is added to the product."""
    if len(step.args) != 2 or step.kwargs:
        return None
    read, bias = (step.args[0], step.args[1]) if reader.entries(step.args[0]) else (step.args[1], step.args[0])
    found = reader.entries(read)
    if isinstance(bias, Ref):
        constant = reader.program.steps[bias.number]
        bias = constant.node if isinstance(constant, Constant) else None
    if found is None or found.kind != LOGITS or not hasattr(bias, "meta"):
        return None
    z = found.logits
    plain = Logits(z.head, z.hidden, z.weight, None, z.transposed, z.size)
    there = bias < reader.program.anchors[z.head.number]
    if z != plain or shape_of(bias) != (z.size,) or not there:
        return None
    return replace(found, logits=replace(z, bias=bias))


@_rule("sub")
def _normalised(reader: _Reader, name: str, step: Call) -> Entries | None:
    """``z - logsumexp(z)``."""
    if len(step.args) != 2 or step.kwargs:
        return None
    read, less = reader.entries(step.args[0]), reader.value(step.args[1])
    if read is None or read.kind != LOGITS or less != Known(read.logits, "logsumexp", keep=True):
        return None
    return Entries(read.logits, LOG_PROBS)


@_rule("log_softmax", "softmax", "exp", "log", "special_entr", "entr")
def _softmax(reader: _Reader, name: str, step: Call) -> Entries | None:
    read = reader.entries(step.args[0] if step.args else step.kwargs.get("input"))
    if read is None or read.factor != 1.0:
        return None
    along = name in ("log_softmax", "softmax")
    if along and (not _of_classes(step, _argument(step, 1, "dim")) or torch.float64 in step.kwargs.values()):
        return None
    made = {
        ("log_softmax", LOGITS): LOG_PROBS,
        ("softmax", LOGITS): PROBS,
        ("exp", LOG_PROBS): PROBS,
        ("log", PROBS): LOG_PROBS,
    }.get((name, read.kind))
    if made is not None:
        return Entries(read.logits, made)
    return Entries(read.logits, P_LOG_PROBS, -1.0) if "entr" in name and read.kind == PROBS else None


@_rule("getitem")
def _cut(reader: _Reader, name: str, step: Call) -> Entries | None:
    """Logits without the classes that a vocabulary was padded with."""
    read, index = reader.entries(step.args[0]), step.args[1]
    if read is None or read.kind != LOGITS or not isinstance(index, tuple) or len(index) != 3:
        return None
    if index[:2] != (slice(None), slice(None)) or not isinstance(index[2], slice) or index[2].step not in (None, 1):
        return None
    begin, end, _ = index[2].indices(read.logits.size)
    z = read.logits
    return replace(read, logits=replace(z, begin=z.begin + begin, size=end - begin)) if end > begin else None


@_rule("sum", "mean", "logsumexp")
def _reduced(reader: _Reader, name: str, step: Call) -> Known | None:
    read = reader.entries(step.args[0] if step.args else step.kwargs.get("input"))
    keep = bool(_argument(step, 2, "keepdim", False))
    if read is None or not _of_classes(step, _argument(step, 1, "dim")) or torch.float64 in step.kwargs.values():
        return None
    if name == "logsumexp":
        return Known(read.logits, name, keep=keep) if read.kind == LOGITS else None
    if read.kind not in _SUMS:
        return None
    factor = read.factor / (read.logits.size if name == "mean" else 1)
    return Known(read.logits, _SUMS[read.kind], keep=keep, factor=factor)


@_rule("gather")
def _picked(reader: _Reader, name: str, step: Call) -> Known | None:
    read = reader.entries(step.args[0])
    label = reader.label(step.args[2]) if _of_classes(step, step.args[1]) else None
    if read is None or label is None or read.kind not in _PICKS:
        return None
    return Known(read.logits, _PICKS[read.kind], label, True, read.factor)


@_rule(by_rows.__name__)
def _loss(reader: _Reader, name: str, step: Call) -> Known | None:
    function, entries, target = step.args
    read, label = reader.entries(entries), reader.ignoring(target)
    others = {name: value for name, value in step.kwargs.items() if name not in ("ignore_index", "label_smoothing")}
    kinds = {F.cross_entropy: LOGITS, F.nll_loss: LOG_PROBS}
    if read is None or label is None or others or kinds.get(function) != read.kind or read.factor != 1.0:
        return None
    smoothing = float(step.kwargs.get("label_smoothing", 0.0))
    if smoothing:
        return Known(read.logits, "smoothed", label, smoothing=smoothing)
    return Known(read.logits, "log_prob", label, factor=-1.0)
