"""What every pass shares: its declaration, its result, and the context that hands facts from pass to pass."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from cggr_compile.passes.facts import LayerStack

if TYPE_CHECKING:
    from torch.fx import Graph, GraphModule

    from cggr_compile.causes import Cause
    from cggr_compile.options import Options

Fact = TypeVar("Fact")
# How much of a training step is computed on selected positions: head, loss and the backward pass through the layers;
# head and loss; nothing.
Level = Literal["routed", "loss", "dense"]
FirstBatches = Callable[[Any, Callable[[list[Any]], Any]], Any]


@dataclass(frozen=True)
class PassResult:
    """Outcome of one pass.

    Attributes:
        matched: whether the pass found what it looks for (and, if it rewrites, rewrote it).
        reason: one sentence; what was found, or why nothing was done.
        details: facts for the report, JSON-serialisable.
        cause: why the graph is to be compiled as it was captured; None: the next pass has its turn.
    """

    matched: bool
    reason: str
    details: dict[str, Any] = field(default_factory=dict)
    cause: Cause | None = None


def refused(cause: Cause, **fields: object) -> PassResult:
    """The graph stays as captured, for a cause of the closed list; ``fields`` are those of its text."""
    return PassResult(False, cause.says(**fields), cause=cause)


class GraphPass:
    """What passes over both kinds of graphs declare.

    Attributes:
        name: that of its file; the option ``disable_passes`` and every report use it.
        stage: which graph it works on.
        optional: whether the graph is right without it, so that ``disable_passes`` may name it.
    """

    name: ClassVar[str]
    stage: ClassVar[str]
    optional: ClassVar[bool] = False


class SemanticPass(GraphPass):
    """A pass over the Dynamo graph.

    Attributes:
        level: the least at which it has a turn: at ``loss`` there may be no LayerStack.
        needs: the facts that it reads; an earlier pass leaves each of them.
        uses: those that it reads where there are any.
        provides: those that it leaves.
        analysis: whether it leaves the graph alone.
        whole_graph: whether it has one turn for all forwards of a graph; others have one for each of them.
    """

    stage = "semantic"
    level: ClassVar[Level] = "loss"
    needs: ClassVar[tuple[type, ...]] = ()
    uses: ClassVar[tuple[type, ...]] = ()
    provides: ClassVar[tuple[type, ...]] = ()
    analysis: ClassVar[bool] = False
    whole_graph: ClassVar[bool] = False

    def enabled(self, ctx: GraphContext) -> bool:
        """Whether it has a turn. At ratio 1.0 only what leaves the mathematics alone has one."""
        return not ctx.dense

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        raise NotImplementedError


class JointPass(GraphPass):
    """A pass over AOTAutograd's joint graph (ATen), before the partitioner. Must be exact.

    Attributes:
        dense: whether it has a turn in graphs that the semantic passes left alone, too.
    """

    stage = "joint"
    dense: ClassVar[bool] = False

    def enabled(self, options: Options) -> bool:
        """Whether it has a turn."""
        return options.row_sparse

    def __call__(self, graph: Graph) -> PassResult:
        raise NotImplementedError


class UndeclaredFactError(TypeError):
    """A pass reads or leaves a fact that it does not declare."""


@dataclass
class GraphContext:
    """State of one graph's trip through the passes: its settings, and the facts found so far.

    ``ctx[LayerStack]`` is the fact of that type, ``ctx.get(LayerStack)`` None where there is none, ``ctx.add(stack)``
    leaves one. While a pass runs, it gets the facts that it declares.

    Where a graph has several forwards (``split``), each has facts of its own besides those of the graph:
    ``with ctx.of(forward):`` the context is that of one of ``ctx.forwards``. ``ctx.every(LayerStack)`` has the facts of
    all.

    Attributes:
        options: at this graph's ratio.
        example_inputs: the arguments of the call that Dynamo captures.
        pays_launches: whether every kernel launch costs the host's time: on CUDA, without CUDA graphs.
        scheduled: whether this is one of several ratios of a graph, compiled after the capture.
        growth: how often the slots that are measured on the first batch are doubled.
        first_batch: gives, for what was measured on the first batch and a way to combine such, that of all processes
            which train the model; None: there are no others.
        measured: whether the ratios are chosen by the gradients (``min_tokens_ratio="auto"``).
        notices, warnings: what the user should hear once: in the log, or as a warning where something is not as the
            options ask.
    """

    options: Options
    example_inputs: list[Any]
    fake_mode: Any
    pays_launches: bool = False
    scheduled: bool = False
    growth: int = 0
    first_batch: FirstBatches | None = None
    measured: bool = False
    notices: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    running: SemanticPass | None = None
    _facts: dict[type, Any] = field(default_factory=dict)
    _own: list[dict[type, Any]] = field(default_factory=list)  # facts of each forward, where there are several
    _here: int | None = None

    def __getitem__(self, kind: type[Fact]) -> Fact:
        self._check_reads(kind)
        fact: Fact = self._seen(self._here)[kind]
        return fact

    def get(self, kind: type[Fact]) -> Fact | None:
        """The fact of this type, None if no pass has left one."""
        self._check_reads(kind)
        return self._seen(self._here).get(kind)

    def every(self, kind: type[Fact]) -> list[Fact]:
        """The facts of this type, of every forward that has one."""
        self._check_reads(kind)
        return [facts[kind] for facts in map(self._seen, self.forwards) if kind in facts]

    @property
    def forwards(self) -> range:
        """The forwards of the graph by their numbers, in order. One, unless it was split."""
        return range(max(1, len(self._own)))

    @property
    def forward(self) -> int:
        """The number of the forward whose context this is now."""
        return self._here or 0

    @contextmanager
    def of(self, forward: int) -> Iterator[None]:
        """Meanwhile the facts are those of one of ``forwards``, and of the graph."""
        outer, self._here = self._here, forward if self._own else None
        try:
            yield
        finally:
            self._here = outer

    def split(self, facts: Sequence[object]) -> None:
        """The graph has several forwards. ``facts``: the first of each."""
        self._own = [{} for _ in facts]
        for forward, fact in enumerate(facts):
            with self.of(forward):
                self.add(fact)

    def add(self, fact: object) -> None:
        """Leave a fact, in place of one of its type."""
        if self.running is not None and type(fact) not in self.running.provides:
            raise UndeclaredFactError(f"{self.running.name} does not say that it provides {type(fact).__name__}")
        facts = self._facts if self._here is None else self._own[self._here]
        facts[type(fact)] = fact

    def restart(self, begin: GraphContext) -> None:
        """Be as ``begin`` was, a copy from before the first pass: nothing found, and nothing said."""
        vars(self).update(vars(begin), running=None, notices=[], warnings=[], _facts={}, _own=[], _here=None)

    @property
    def dense(self) -> bool:
        """True when every token is kept, so that the graph stays the user's."""
        return self.options.min_tokens_ratio == 1.0

    @property
    def level(self) -> Level:
        """What the facts found so far are enough for."""
        here = self.forwards if self._here is None else [self._here]
        return "routed" if all(LayerStack in self._seen(forward) for forward in here) else "loss"

    @property
    def observing(self) -> bool:
        """Whether the schedule depends on the router's figures."""
        return self.scheduled and self.options.dynamic_threshold

    def _seen(self, forward: int | None) -> Mapping[type, Any]:
        """The facts of the graph, and those of one of its forwards."""
        return self._facts if forward is None or not self._own else ChainMap(self._own[forward], self._facts)

    def _check_reads(self, kind: type) -> None:
        declared = self.running
        if declared is not None and kind not in (*declared.needs, *declared.uses, *declared.provides):
            raise UndeclaredFactError(f"{declared.name} does not say that it needs or uses {kind.__name__}")
