"""The backward operators of the package flash-attn (FlashAttention-2, arXiv 2307.08691) seen as ordinary ones.

They read and write [B, S, heads, D], or [tokens, heads, D] where sequences are packed, and arrive functionalized::

    _, dq, dk, dv = auto_functionalized_v2(flash_attn._flash_attn_backward, dout=..., q=..., _all_bases=[...])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from cggr_compile.passes.base import fake_value, shape_of

if TYPE_CHECKING:
    from cggr_compile.passes.row_sparse.layout import Layout
    from cggr_compile.passes.row_sparse.values import RowValues

aten = torch.ops.aten
prims = torch.ops.prims

# known by name: the package need not be installed
PACKED = "flash_attn._flash_attn_varlen_backward.default"
BACKWARDS = ("flash_attn._flash_attn_backward.default", PACKED)
FORWARDS = ("flash_attn._flash_attn_forward.default", "flash_attn._flash_attn_varlen_forward.default")
GRADIENTS = ("dq", "dk", "dv")


def is_backward(node: Node) -> bool:
    return str(node.target) == "auto_functionalized_v2" and str(node.args[0]) in BACKWARDS


def is_packed(node: Node) -> bool:
    return str(node.args[0]) == PACKED


def layout(rv: RowValues, node: Node) -> Layout:
    """Of queries, keys, values and their gradients."""
    return rv.layout("BS", None, None) if is_packed(node) else rv.layout("B", "S", None, None)


def obstacle(rv: RowValues, node: Node) -> str | None:
    """Why the gradient of this call cannot be computed from the selected queries."""
    given = node.kwargs
    if given["dropout_p"]:
        return f"attention dropout {given['dropout_p']:g}"
    if given["alibi_slopes"] is not None:
        return "flash-attn with ALiBi slopes"
    if is_packed(node) and rv.batch > 1:
        return "flash-attn over packed sequences, in a batch of more than one"
    return None


def places(node: Node) -> dict[int, int] | None:
    """Which result holds which gradient (0: dq, 1: dk, 2: dv); None where they are written into parts of others."""
    keys = [key for key in node.kwargs if key.startswith(tuple(f"_{name}_" for name in GRADIENTS))]
    found = {node.kwargs.get(f"_{name}_base_index"): i for i, name in enumerate(GRADIENTS)}
    if len(keys) != len(GRADIENTS) or len(found) != len(GRADIENTS) or None in found:
        return None
    return {1 + base: i for base, i in found.items()}  # type: ignore[misc, operator]  # result 0 is the operator's own


def by_heads(rv: RowValues, node: Node, tensor: Node) -> Node:
    """[B, heads, S, D] of what the operator has as [B, S, heads, D] or, packed, [S, heads, D]; of K rows likewise."""
    if is_packed(node):
        tensor = rv.emit.call(aten.unsqueeze.default, tensor, 0)
    return rv.emit.call(aten.permute.default, tensor, [0, 2, 1, 3])


def by_tokens(rv: RowValues, node: Node, tensor: Node) -> Node:
    """The inverse of :func:`by_heads`."""
    tensor = rv.emit.call(aten.permute.default, tensor, [0, 2, 1, 3])
    return rv.emit.call(aten.squeeze.dim, tensor, 0) if is_packed(node) else tensor


def logsumexp(rv: RowValues, node: Node, heads: Layout) -> Node:
    """float32 [B, heads, K] at the selected queries."""
    statistics: Any = node.kwargs["softmax_lse"]
    if is_packed(node):
        statistics = rv.emit.call(aten.unsqueeze.default, statistics, 0)
    return rv.gather(statistics, heads[:3])


def mask(rv: RowValues, node: Node) -> tuple[Node | None, bool]:
    """What the selected queries attend to: bool [B, 1, K, keys] (None: everything), and whether causally as well.

    A query sees ``window_size_left`` keys before and ``window_size_right`` after its own; -1 is no bound. The last
    query's own key is the last one, of each sequence.
    """
    given: Any = node.kwargs
    left, right = given["window_size_left"], 0 if given["causal"] else given["window_size_right"]
    tokens = 0 if is_packed(node) else 1
    queries, keys = shape_of(given["q"])[tokens], shape_of(given["k"])[tokens]
    call, device = rv.emit.call, fake_value(rv.rows).device
    row = call(aten.view.default, rv.rows, [rv.batch, 1, rv.slots, 1])
    column = call(prims.iota.default, keys, start=0, step=1, dtype=torch.int64, device=device, requires_grad=False)
    seen = None
    aligned = queries == keys
    if is_packed(node):
        aligned = given["cu_seqlens_q"] is given["cu_seqlens_k"]
        sequence, row = _from_the_end(rv, row, given["cu_seqlens_q"])
        other, column = _from_the_end(rv, column, given["cu_seqlens_k"])
        seen = call(aten.eq.Tensor, sequence, other)
    elif not aligned:
        column = call(aten.sub.Tensor, column, keys - queries)
    causal = aligned and right == 0
    if right >= 0 and not causal:
        seen = _both(rv, seen, call(aten.le.Scalar, call(aten.sub.Tensor, column, row), right))
    if 0 <= left < keys - 1:
        seen = _both(rv, seen, call(aten.le.Scalar, call(aten.sub.Tensor, row, column), left))
    return None if seen is None else call(aten.expand.default, seen, [rv.batch, 1, rv.slots, keys]), causal


def _from_the_end(rv: RowValues, tokens: Node, cumulative: Node) -> tuple[Node, Node]:
    """The packed sequence of each token, and the token's place in it counted from its end (-1 is the last).

    ``cumulative`` [sequences + 1]: where each begins, and the end. Tokens behind the last one belong to it.
    """
    call, (count,) = rv.emit.call, shape_of(cumulative)
    ends = call(prims.convert_element_type.default, call(aten.slice.Tensor, cumulative, 0, 1), torch.int64)
    passed = call(aten.ge.Tensor, call(aten.unsqueeze.default, tokens, -1), ends)
    sequence = call(aten.clamp_max.default, call(aten.sum.dim_IntList, passed, [-1]), count - 2)
    return sequence, call(aten.sub.Tensor, tokens, call(aten.index.Tensor, ends, [sequence]))


def _both(rv: RowValues, left: Node | None, right: Node) -> Node:
    return right if left is None else rv.emit.call(aten.bitwise_and.Tensor, left, right)
