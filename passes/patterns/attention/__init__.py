"""The attention operators that are recognised, one file per family; what each can and cannot do is said there."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch.fx import Node

from cggr_compile.passes.facts import Attention
from cggr_compile.passes.nodes import same_size, shape_of
from cggr_compile.passes.patterns.attention.base import AttentionAdapter, Backward, Hides
from cggr_compile.passes.patterns.attention.composite import Composite
from cggr_compile.passes.patterns.attention.flash import FlashAttn
from cggr_compile.passes.patterns.attention.flex import Flex
from cggr_compile.passes.patterns.attention.sdpa import ScaledDotProduct

ADAPTERS: tuple[AttentionAdapter, ...] = (
    ScaledDotProduct(),
    Flex(),
    FlashAttn(),
    Composite(),
)


def find_attention(node: Node, stream: Collection[Node], batch: Any, length: Any) -> Attention | None:
    """The attention at ``node`` of Dynamo's graph whose keys and values are rows of the stream, else None.

    Keys and values must be laid out with the batch on axis 0 and all ``length`` tokens on one axis.
    """
    for adapter in ADAPTERS:
        found = adapter.recognise(node, stream)
        if found is not None:
            break
    else:
        return None
    if not all(tensor in stream for tensor in (found.query, found.key, found.value)):
        return None
    key_axis, value_axis = (
        _token_axis(tensor, axis, batch, length)
        for tensor, axis in ((found.key, found.key_axis), (found.value, found.value_axis))
    )
    if key_axis is None or value_axis is None:
        return None
    tensors, users = (found.key, found.value), (found.key_user, found.value_user)
    return Attention(adapter.kind, node, *tensors, key_axis, value_axis, *users, found.mask)


def further_keys(node: Node, stream: Collection[Node]) -> int:
    """How many keys the attention at ``node`` of Dynamo's graph has beside one for every query; 0: it is none."""
    found = next((found for adapter in ADAPTERS if (found := adapter.recognise(node, stream)) is not None), None)
    if found is None or found.query not in stream or found.value not in stream:
        return 0
    # a key may be transposed
    keys, queries = (shape_of(tensor)[found.value_axis] for tensor in (found.value, found.query))
    return keys - queries if isinstance(keys, int) and isinstance(queries, int) else 0


def hidden_by(attention: Attention, stream: Collection[Node]) -> Hides | str | None:
    """What an attention of Dynamo's graph hides besides later keys; None: nothing, or why that cannot be read."""
    return next(adapter for adapter in ADAPTERS if adapter.kind == attention.kind).hides(attention, stream)


def _token_axis(tensor: Node, axis: int, batch: Any, length: Any) -> int | None:
    """``axis``, counted from the first one, if that and the batch have the sizes of the stream."""
    shape = shape_of(tensor)
    if len(shape) < 3 or not same_size(shape[0], batch) or not same_size(shape[axis], length):
        return None
    return len(shape) + axis


def is_attention(node: Node) -> bool:
    """Whether ``node`` of the joint graph is an attention of the forward pass."""
    return any(adapter.is_forward(node) for adapter in ADAPTERS)


def find_backward(node: Node) -> Backward | None:
    """The attention backward at ``node`` of the joint graph."""
    return next((found for adapter in ADAPTERS if (found := adapter.backward(node)) is not None), None)
