"""What a family of attention operators says about itself: its calls in Dynamo's graph, its backward in the joint."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch.fx import Node

if TYPE_CHECKING:
    from cggr_compile.passes.facts import Attention
    from cggr_compile.passes.fx import Emitter
    from cggr_compile.passes.joint.row_sparse.layout import Layout, Tag
    from cggr_compile.passes.joint.row_sparse.values import RowValues

# the gradients of an attention backward
QUERY, KEY, VALUE, MASK = range(4)
BY_HEADS = ("B", None, "S", None)  # [B, heads, S, D]


@dataclass(frozen=True)
class Forward:
    """One attention call of Dynamo's graph.

    Attributes:
        query, key, value: the tensors that attention reads; keys and values have sequences on axis 0.
        key_axis, value_axis: where each of the two has its tokens, counted from the last axis.
        key_user, value_user: the calls that read them.
        mask: the tensor added to the scores or selecting among them, if any.
    """

    query: Node
    key: Node
    value: Node
    key_axis: int
    value_axis: int
    key_user: Node
    value_user: Node
    mask: Node | None = None


@dataclass(frozen=True)
class Hides(ABC):
    """What keeps the queries of an attention from keys. Equal where two attentions hide the same."""

    @property
    @abstractmethod
    def inputs(self) -> tuple[Node, ...]:
        """The nodes that it is computed from."""

    @abstractmethod
    def previous(self, emit: Emitter) -> Node:
        """Whether a query may see the key just before its own, in any head: bool [B or 1, S] (any value at 0)."""


@dataclass(frozen=True)
class Arguments:
    """What ``cggr::attention_rows_backward`` wants to know of an attention.

    Attributes:
        query, out: [B, heads, S, D]; key, value: [B, kv_heads, keys, D].
        logsumexp: float32 [B, heads, K], of the selected queries, natural logarithm.
        mask: bool or additive [B or 1, heads or 1, K, keys], of the selected queries; None: nothing is hidden.
        causal: a query at position i attends to keys at positions <= i.
    """

    query: Node
    key: Node
    value: Node
    out: Node
    logsumexp: Node
    mask: Node | None
    causal: bool
    scale: float
    softcap: float = 0.0


@dataclass(frozen=True)
class Backward(ABC):
    """One backward call of the joint graph.

    Attributes:
        grad: the gradient of attention's output.
        gradients: what each result holds: ``QUERY``, ``KEY``, ``VALUE`` or ``MASK``, by the result's index.
        axes: where queries, keys, values and their gradients have their sequences and positions.
    """

    node: Node
    grad: Node
    gradients: Mapping[int, int] = field(default_factory=lambda: {i: i for i in range(4)})
    axes: tuple[Tag, ...] = BY_HEADS

    @abstractmethod
    def obstacle(self, batch: int) -> str | None:
        """Why the gradient of this call cannot be computed from the selected queries, of ``batch`` sequences."""

    @abstractmethod
    def arguments(self, rv: RowValues, heads: Layout) -> Arguments:
        """What the backward on rows needs; called without an obstacle. ``heads``: the layout of [B, heads, S, D]."""

    def to_heads(self, rv: RowValues, tensor: Node) -> Node:
        """[B, heads, S, D] of a tensor that this operator reads or writes; of K rows likewise."""
        return tensor

    def from_heads(self, rv: RowValues, tensor: Node) -> Node:
        """The inverse of :meth:`to_heads`."""
        return tensor

    def getters(self) -> dict[int, list[Node]]:
        """The nodes in use that take a result out of the call, by the result's index."""
        found: dict[int, list[Node]] = {}
        for user in self.node.users:
            assert user.target is operator.getitem
            if user.users:
                found.setdefault(int(user.args[1]), []).append(user)  # type: ignore[arg-type]
        return found

    def uses_of(self, *which: int) -> list[Node]:
        """The nodes in use that take out one of these gradients."""
        return [getter for i, found in self.getters().items() if self.gradients.get(i) in which for getter in found]


class AttentionAdapter(Protocol):
    """One family of attention operators.

    A new one is a file with a subclass, and a line in ``ADAPTERS`` of ``__init__.py``. An operator without
    :meth:`backward` has gradients that the rules for ordinary operators carry.

    Attributes:
        kind: its name in reports.
    """

    kind: str

    def recognise(self, node: Node, stream: Collection[Node]) -> Forward | None:
        """The attention at ``node`` of Dynamo's graph; ``stream``: what is computed from the embedding."""

    def hides(self, attention: Attention, stream: Collection[Node]) -> Hides | str | None:
        """What one of its attentions hides besides later keys; None: nothing, or why that cannot be read."""
        return None

    def is_forward(self, node: Node) -> bool:
        """Whether ``node`` of the joint graph is an attention of the forward pass: a layer of its own begins there."""
        return False

    def backward(self, node: Node) -> Backward | None:
        """The attention backward at ``node`` of the joint graph. None also where its results cannot be told apart."""
        return None
