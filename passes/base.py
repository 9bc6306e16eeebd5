"""What every pass shares: its protocol, its result, and the facts earlier passes left for later ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

if TYPE_CHECKING:
    from torch.fx import Graph, GraphModule, Node

    from cggr_compile.causes import Cause
    from cggr_compile.options import Options
    from cggr_compile.passes.analysis.positions import Region


@dataclass(frozen=True)
class PassResult:
    """Outcome of one pass.

    Attributes:
        matched: whether the pass found what it looks for (and, if it rewrites, rewrote it).
        reason: one sentence; what was found, or why nothing was done.
        details: facts for the report, JSON-serialisable.
        cause: of a required pass without a match, the cause that ``reason`` is the text of.
    """

    matched: bool
    reason: str
    details: dict[str, Any] = field(default_factory=dict)
    cause: Cause | None = None


def refused(cause: Cause, **fields: object) -> PassResult:
    """No match, for a cause of the closed list; ``fields`` are those of its text."""
    return PassResult(False, cause.says(**fields), cause=cause)


class GraphPass(Protocol):
    """A semantic pass over the Dynamo graph.

    ``required``: without a match of this pass the whole graph goes to the compiler untouched.
    ``analysis``: finds things for later passes and never changes the graph.
    """

    name: str
    required: bool
    analysis: bool

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult: ...


class JointPass(Protocol):
    """A pass over AOTAutograd's joint graph (ATen), before the partitioner. Must be exact."""

    name: str

    def __call__(self, graph: Graph) -> PassResult: ...


@dataclass(frozen=True)
class Attention:
    """One attention call of a block.

    Attributes:
        kind: the operator's family, an adapter's ``kind`` (``passes/patterns/attention``).
        node: the operator's call, or the softmax of a hand-written attention.
        key, value: the tensors whose rows later positions attend to.
        key_dim, value_dim: the token axis of each.
        key_user, value_user: the calls that read them (the same one but for a hand-written attention and for packed
            sequences, where it is the view that packs).
        mask: the attn_mask argument, if any; a BlockMask is none.
    """

    kind: str
    node: Node
    key: Node
    value: Node
    key_dim: int
    value_dim: int
    key_user: Node
    value_user: Node
    mask: Node | None


@dataclass(frozen=True)
class Block:
    """One repeated layer: everything between two nodes of the residual stream.

    Attributes:
        input, output: residual-stream nodes [B, S, H]; a block's output is the next one's input.
        attention: the block's single attention.
        name: module path from ``nn_module_stack`` where there is one, else ``block_<i>``.
        signature: hash of the block's operators and shapes; equal for isomorphic blocks.
    """

    input: Node
    output: Node
    attention: Attention
    name: str
    signature: str


@dataclass(frozen=True)
class LayerStack:
    """The decoder: residual stream, blocks and the position-wise tail (final norm) before the head.

    Attributes:
        source: first residual-stream node [B, S, H] (the embedding).
        tail: nodes from the last block's output (exclusive) to the head's input (inclusive), in order; each
            works on every position by itself.
        tail_start: first position that the tail keeps (it may slice the sequence).
        stream: every node that depends on the embedding and reaches the head.
    """

    source: Node
    blocks: tuple[Block, ...]
    tail: tuple[Node, ...]
    tail_start: int
    stream: frozenset[Node]


@dataclass(frozen=True)
class LossSite:
    """Head and cross-entropy of a token-level language-model loss.

    Attributes:
        loss: the cross_entropy node.
        head: the node that computes logits, with ``weight`` [V, H] (or [H, V] if ``transposed``) and ``bias``.
        hidden: the head's input.
        chain: nodes from the head (inclusive) to the cross-entropy's input (inclusive), in order.
        target: class indices as given to the cross-entropy, aligned with the logits by the user's own shift.
        start: first position of the sequence that has a logit row in the loss.
        scale, softcap: logits are ``softcap * tanh(scale * (h W^T + b) / softcap)``; softcap 0 means none.
    """

    loss: Node
    head: Node
    weight: Node
    bias: Node | None
    transposed: bool
    hidden: Node
    chain: tuple[Node, ...]
    target: Node
    vocab: int
    start: int
    scale: float
    softcap: float
    reduction: Literal["mean", "sum"]
    ignore_index: int
    label_smoothing: float


# What a differentiable result of the captured graph is; see ``classify_outputs``.
OutputKind = Literal["loss", "part", "logits", "cache", "kept"]


@dataclass(frozen=True)
class Outputs:
    """What becomes of the gradient of the captured graph's results.

    Attributes:
        kinds: of every differentiable result, by its position.
        objective: positions of what a training loop adds up, as far as the graph tells: ``loss``, and what is ``kept``
            and is one number.
        dense_blocks: indices of the blocks that lie between a kept result and the parameters: their backward computes
            every position.
        every_position: whether anything differentiable but the cross-entropy reads what an attention computes, at
            positions of padding too.
    """

    kinds: dict[int, OutputKind] = field(default_factory=dict)
    objective: tuple[int, ...] = ()
    dense_blocks: frozenset[int] = frozenset()
    every_position: bool = False


@dataclass(frozen=True)
class Candidates:
    """Which positions may be selected, and what they predict.

    Attributes:
        target: int64 [B, S], class index per position, ``ignore_index`` where there is none.
        valid: bool [B, S], the candidates: positions with a target.
        anchor: node in front of which router and selection are inserted.
    """

    target: Node
    valid: Node
    anchor: Node


@dataclass(frozen=True)
class RouterScores:
    """float32 [B, S] each: difficulty, top-1 probability and entropy per position."""

    difficulty: Node
    top1: Node
    entropy: Node


@dataclass(frozen=True)
class ExtraRows:
    """Positions that carry gradient though the loss may not select them: ``regions`` together.

    ``most``: for how many of a sequence there are slots; what exceeds them is dropped, and counted.
    """

    regions: tuple[Region, ...]
    most: int


@dataclass(frozen=True)
class GradientRows:
    """The rows that carry gradient where they are more than the selected ones; see ``cggr::gradient_rows``.

    Attributes:
        rows, keep: [B, G], as those of a selection.
        places: int64 [B, K], the slot of each selected row among these.
        extra: bool [B, S], the positions that were added, selected or not.
    """

    rows: Node
    keep: Node
    places: Node
    extra: Node


@dataclass(frozen=True)
class Selection:
    """The selected positions: those that carry loss.

    Attributes:
        rows: int64 [B, K], distinct positions; the selected ones first and sorted, then unused slots.
        keep: bool [B, K], False for an unused slot.
        weights: float32 [B, K], what the loss of each counts; see ``cggr::row_weights``.
        state: the graph input (seed, step), int64 [2].
        stats: float32 [5] or [6], see ``cggr::stats``.
        gradient: the rows that carry gradient; None where they are the same.
    """

    rows: Node
    keep: Node
    weights: Node
    state: Node
    stats: Node
    gradient: GradientRows | None = None


@dataclass(frozen=True)
class StaticSizes:
    """Symbolic sizes that were replaced by their values.

    Attributes:
        sizes: every symbolic integer about the captured graph's arguments.
        kept: positions of the arguments that the graph still takes.
    """

    sizes: tuple[Any, ...]
    kept: tuple[int, ...]


@dataclass
class GraphContext:
    """State of one graph's trip through the passes."""

    options: Options
    example_inputs: list[Any]
    fake_mode: Any
    # every kernel launch costs the host's time: on CUDA, without CUDA graphs
    pays_launches: bool = False
    static: StaticSizes | None = None
    loss: LossSite | None = None
    stack: LayerStack | None = None
    outputs: Outputs = field(default_factory=Outputs)
    # bool or int [B, S] graph input that is nonzero at real tokens
    padding: Node | None = None
    # such inputs of which the mask was replaced by is_causal
    unmasked: tuple[Node, ...] = ()
    candidates: Candidates | None = None
    router: RouterScores | None = None
    # what ``options.gradient`` stands for in this graph; TrainedInputs settles ``auto``
    gradient: Literal["routed", "exact"] = field(init=False)
    extra_rows: ExtraRows | None = None
    selection: Selection | None = None
    # one of several ratios of this graph, compiled after the capture
    rung: bool = False
    # what ObserveRouter added
    observed: Node | None = None
    # why there is no router, though the options ask for one
    unrouted: str = ""
    # what the user should hear once: in the log, or as a warning where something is not as the options ask
    notices: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.gradient = "exact" if self.options.gradient == "exact" else "routed"

    @property
    def dense(self) -> bool:
        """True when every token is kept, so that the graph stays the user's."""
        return self.options.min_tokens_ratio == 1.0


def shape_of(node: Any) -> tuple[Any, ...]:
    """Shape of a node's (fake) tensor; sizes are ints or SymInts. Empty for non-tensors."""
    value = fake_value(node)
    return tuple(value.shape) if hasattr(value, "shape") else ()


def fake_value(node: Any) -> Any:
    """The fake tensor that the capture recorded for a node (Dynamo: example_value, AOTAutograd: val)."""
    return node.meta.get("example_value", node.meta.get("val"))


def differentiable(node: Any) -> bool:
    """Whether a gradient flows into a node's value, a tensor or several."""
    value = fake_value(node)
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)


def module_of(node: Node) -> str:
    """Path of the innermost module that computes a node, such as model.layers.0.mlp; empty where there is none."""
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return ".".join(paths[-1].split(".")[1:]) if paths else ""


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are statically the same number, without adding a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    left, right = getattr(getattr(a, "node", None), "expr", a), getattr(getattr(b, "node", None), "expr", b)
    return bool(left == right)
