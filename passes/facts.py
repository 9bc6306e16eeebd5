"""What passes find out about a graph and leave for later ones: one frozen record per subject.

A pass names the records that it reads and leaves by their types; see ``passes/base.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from fractions import Fraction

    from torch.fx import Node

    from cggr_compile.passes.analysis.positions import Region
    from cggr_compile.passes.base import PassResult
    from cggr_compile.passes.patterns.token_values.layout import Layout
    from cggr_compile.passes.patterns.token_values.masks import Way
    from cggr_compile.passes.patterns.token_values.program import Taken
    from cggr_compile.passes.step_interface import Form, PredictorKey


@dataclass(frozen=True)
class Forward:
    """One of several forwards of a graph: what is computed from embeddings of its own, to a loss or values of its own.

    Attributes:
        embeddings: nodes that its hidden states begin with; see ``patterns/forwards.py``.
        others: those of the other forwards.
    """

    embeddings: frozenset[Node]
    others: frozenset[Node]


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
class Mixer:
    """What mixes the positions of a block without being attention: a convolution, a scan, linear attention, a shift.

    Attributes:
        kind: what it is told as, such as ``convolution``; see ``passes/patterns/token_mixers.py``.
        nodes: the calls that mix positions, in order; what is between them belongs to the mixer too.
        name: path of the module that all of them are called in, empty where there is none.
    """

    kind: str
    nodes: tuple[Node, ...]
    name: str


@dataclass(frozen=True)
class Block:
    """One repeated layer: everything between two nodes of the residual stream.

    Attributes:
        input, output: residual-stream nodes [B, S, H]; a block's output is the next one's input.
        attentions: mostly one; several side by side, as in differential attention; none where a mixer is in its place.
        mixer: what else mixes its positions; in place of an attention, beside it, before or behind it.
        name: module path from ``nn_module_stack`` where there is one, else ``block_<i>``.
        signature: hash of the block's operators and shapes; equal for isomorphic blocks.
    """

    input: Node
    output: Node
    attentions: tuple[Attention, ...]
    mixer: Mixer | None
    name: str
    signature: str

    @property
    def mixing(self) -> tuple[Node, ...]:
        """The calls that mix its positions: behind the last of them every position is by itself."""
        attentions = (node for one in self.attentions for node in (one.node, one.value_user))
        return (*attentions, *(() if self.mixer is None else self.mixer.nodes))

    @property
    def kinds(self) -> tuple[str, ...]:
        """What its attentions and its mixer are, as far as it has them."""
        return (*(one.kind for one in self.attentions), *(() if self.mixer is None else (self.mixer.kind,)))


@dataclass(frozen=True)
class FinalStates:
    """The hidden states that are the last to mix positions, and the position-wise tail from there to the head.

    Attributes:
        states: [B, S, H]; the output of the last block, where there is a stack of blocks.
        tail: nodes from there (exclusive) to the head's input (inclusive), in order, such as the final norm; each
            works on every position by itself.
        tail_start: first position that the tail keeps (it may slice the sequence).
        stream: every node that depends on the tokens and reaches the head.
    """

    states: Node
    tail: tuple[Node, ...]
    tail_start: int
    stream: frozenset[Node]


@dataclass(frozen=True)
class LayerStack:
    """The decoder: blocks around a residual stream, up to the final states.

    Attributes:
        source: first residual-stream node [B, S, H] (the embedding).
    """

    source: Node
    blocks: tuple[Block, ...]

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """Those of the blocks, in order."""
        return tuple(attention for block in self.blocks for attention in block.attentions)


@dataclass(frozen=True)
class NoLayerStack:
    """Why there is no stack of blocks: a refusal, if there are no final states either."""

    refusal: PassResult


@dataclass(frozen=True)
class LossSite:
    """Head and cross-entropy of a token-level language-model loss; or the head of several per-token values.

    Attributes:
        loss: the cross_entropy node; the first of the values (``TokenValues``), whose ``reduction`` is ``none``.
        head: the node that computes logits, with ``weight`` [V, H] (or [H, V] if ``transposed``) and ``bias``.
        hidden: the head's input.
        chain: nodes from the head (inclusive) to the cross-entropy's input (inclusive), in order.
        target: class indices as given to the cross-entropy, aligned with the logits by the user's own shift; None where
            values have no classes of their own.
        start: first position of the sequence that has a logit row in the loss.
        scale, softcap: logits are ``softcap * tanh(scale * (h W^T + b) / softcap)``; softcap 0 means none.
        values: all of the per-token values; none where ``loss`` is a cross-entropy.
    """

    loss: Node
    head: Node
    weight: Node
    bias: Node | None
    transposed: bool
    hidden: Node
    chain: tuple[Node, ...]
    target: Node | None
    vocab: int
    start: int
    scale: float
    softcap: float
    reduction: Literal["mean", "sum", "none"]
    ignore_index: int
    label_smoothing: float
    values: tuple[Node, ...] = ()

    @property
    def ends(self) -> tuple[Node, ...]:
        """Where the gradient enters that is taken at selected positions: the cross-entropy, or the values."""
        return self.values or (self.loss,)


@dataclass(frozen=True)
class NoSingleLoss:
    """Why the loss is not one cross-entropy of the logits: a refusal, if it is nothing else that is known."""

    refusal: PassResult


@dataclass(frozen=True)
class TokenValues:
    """Per-token values, of which the user computes a loss, in the graph or outside.

    Attributes:
        stem: the hidden state [B, S', H] that they are computed from, position by position.
        heads: the products that make logits of it. head_layouts: of each, its axes and positions.
        beside: differentiable tensors that go into the values behind the heads, such as a temperature that is trained.
        values: differentiable, without an axis over the vocabulary, read by what lies outside.
        layouts: of each value, its axes and which positions of ``stem`` it has.
        masks: of each value, the positions whose gradient may be other than zero, as alternatives.
        labels: class indices with their layout, of the first value that has some; None: none has.
    """

    stem: Node
    heads: tuple[Node, ...]
    head_layouts: tuple[Layout, ...]
    beside: tuple[Node, ...]
    values: tuple[Node, ...]
    layouts: tuple[Layout, ...]
    masks: tuple[frozenset[Way], ...]
    labels: Taken | None

    @property
    def everywhere(self) -> bool:
        """Whether some value may be differentiated at every position."""
        return any(frozenset() in ways for ways in self.masks)


@dataclass(frozen=True)
class LoweredValues:
    """Per-token values that ``cggr::token_log_probs`` computes in place of the user's logits.

    Attributes:
        heads: the products that made the logits, which are gone. head_layouts: as those of ``TokenValues``.
        everywhere: calls that are given a label for every position.
        labels: what ``TokenValues.labels`` were of the logits; the calls may have others where there is none.
    """

    heads: tuple[Node, ...]
    head_layouts: tuple[Layout, ...]
    everywhere: frozenset[Node]
    labels: Taken | None


# What a differentiable result of the captured graph is; see ``classify_outputs``.
OutputKind = Literal["loss", "value", "part", "logits", "cache", "kept"]


@dataclass(frozen=True)
class Outputs:
    """What becomes of the gradient of the captured graph's results.

    Attributes:
        kinds: of every differentiable result, by its position.
        objective: positions of what a training loop adds up, as far as the graph tells: ``loss``, and what is ``kept``
            and is one number; the ``value`` ones, where the loss is computed outside.
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
    """float32 [B, S] each: difficulty per position; top-1 probability and entropy, None where no head was run."""

    difficulty: Node
    top1: Node | None
    entropy: Node | None


@dataclass(frozen=True)
class Predictor:
    """What predicts the difficulty; see ``cggr::predict``.

    Attributes:
        key: which of the model's predictors it is.
        state: the graph input, float32, that it is before the step.
        hidden: [B, S, H], what it reads of every position, without gradient.
        weight: [V, E], the head, of which it reads the label's row, without gradient.
    """

    key: PredictorKey
    state: Node
    hidden: Node
    weight: Node


@dataclass(frozen=True)
class RowGradients:
    """float32 [B, K] of the rows that carry loss: ``norms`` of softmax - onehot(label), without gradient."""

    norms: Node


@dataclass(frozen=True)
class FittedPredictor:
    """``state`` of a predictor after the step, float32."""

    key: PredictorKey
    state: Node


@dataclass(frozen=True)
class RowTail:
    """What of the last block runs on the rows of the loss only.

    Attributes:
        entries: values [B, S, X] of which rows are taken.
        nodes: the calls behind them, in order, up to the block's output; each works on every row by itself.
    """

    entries: tuple[Node, ...]
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class ExtraRows:
    """Positions that carry gradient though the loss may not select them: ``regions`` together.

    ``most``: for how many of a sequence there are slots; what exceeds them is dropped, and counted.
    """

    regions: tuple[Region, ...]
    most: int


@dataclass(frozen=True)
class Slots:
    """Slots of a sequence: a share of its positions, rounded up, or a number.

    Attributes:
        loss: for the rows that carry loss.
        gradient: for these and their context together; those of ``ExtraRows`` come on top.
        doublings: how often they may be doubled, where they are measured on the first batch; 0 where they are given.
    """

    loss: Fraction | int
    gradient: Fraction | int
    doublings: int = 0


@dataclass(frozen=True)
class GradientRows:
    """The rows that carry gradient where they are more than the selected ones; see ``cggr::gradient_rows``.

    Attributes:
        rows, keep: [B, G], as those of a selection.
        places: int64 [B, K], the slot of each selected row among these.
        extra: bool [B, S], the positions that carry gradient whatever is selected, selected or not; None: no such ones.
    """

    rows: Node
    keep: Node
    places: Node
    extra: Node | None


@dataclass(frozen=True)
class Selection:
    """The selected positions: those that carry loss.

    Attributes:
        rows: int64 [B, K], distinct positions; the selected ones first and sorted, then unused slots.
        keep: bool [B, K], False for an unused slot.
        weights: float32 [B, K], what the loss of each counts; see ``cggr::row_weights``.
        public: int64 [B, K], the positions, -1 for an unused slot: what the runtime keeps.
        state: (seed, step), int64 [2]: the graph input, with another seed and step for each of several forwards.
        stats: float32 [5] or [8], see ``cggr::stats``.
        gradient: the rows that carry gradient; None where they are the same.
    """

    rows: Node
    keep: Node
    weights: Node
    public: Node
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


@dataclass(frozen=True)
class Padding:
    """How the batch is padded.

    Attributes:
        mask: bool or int [B, S] graph input that is nonzero at real tokens; None if no attention reads one.
        unmasked: such inputs of which the attention mask was replaced by ``is_causal``.
    """

    mask: Node | None = None
    unmasked: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Routing:
    """What ``options.gradient`` stands for in this graph; ``auto`` is settled."""

    gradient: Literal["routed", "exact"]


@dataclass(frozen=True)
class NoRouter:
    """Why there is no router, though the options ask for one."""

    why: str


@dataclass(frozen=True)
class Figures:
    """How many weights, positions and figures the graph returns behind the user's results."""

    form: Form


@dataclass(frozen=True)
class ObservedRouter:
    """The router's figures beside an unmodified loss: float32 [5], see ``cggr::stats``."""

    stats: Node
