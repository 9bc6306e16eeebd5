"""Finds what mixes tokens without being attention: convolutions, scans, linear attention, shifts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence, Set
from typing import TYPE_CHECKING, Any

from cggr_compile import compat
from cggr_compile.passes.facts import Attention, LayerStack
from cggr_compile.passes.fx import ancestors, descendants
from cggr_compile.passes.nodes import argument, module_of, op_name, same_size, shape_of
from cggr_compile.passes.patterns.quantised import is_quantised_product

if TYPE_CHECKING:
    from torch.fx import Node

_SCANS = {"cumsum", "cumprod", "logcumsumexp", "cummax", "cummin"}
_ALONG = {*_SCANS, "roll", "flip"} | {
    *("mean", "sum", "amax", "amin", "var", "std", "norm", "softmax", "log_softmax", "logsumexp")
}
# pieces of the sequence side by side, and positions in other places
JOINS = ("cat", "slice_scatter")
MOVES = (*JOINS, "pad", "roll", "flip")
_PLACED = {"stack", "select_scatter", "slice_scatter"}
_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}
_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "convolution"}
_ATTENTIONS = {"scaled_dot_product_attention", "flex_attention"}
_LOOPS = {"scan", "associative_scan", "while_loop", "triton_kernel_wrapper_functional"}
_OURS = ("aten", "prims", "cggr")


def mixing_calls(
    ordered: Sequence[Node], stream: Set[Node], attentions: Iterable[Attention], start: Node
) -> list[Node]:
    """Those of ``ordered`` that mix positions behind ``start`` [B, S, H], and are no part of an attention.

    Products count whatever their lengths are: of chunks of the sequence, padded or not, as well.
    """
    parts = {node for attention in attentions for node in attention_core(attention)}
    behind, length = descendants([start]), shape_of(start)[1]
    # positions in another order are told, not gated
    found = [n for n in ordered if n in behind and n not in parts and op_name(n) not in ("roll", "flip")]
    return [n for n in found if _mixes(n, stream, length)]


def attention_core(attention: Attention) -> set[Node]:
    """The calls that an attention is made of: from what reads the keys to the call that has read keys and values."""
    behind = descendants([attention.node]) & descendants([attention.value_user])
    last = next(node for node in attention.node.graph.nodes if node in behind)
    return {attention.node, *descendants([attention.key_user]) & ancestors([last])}


def kind_of(nodes: Sequence[Node]) -> str:
    """What mixes positions by these calls: named for the one of them that reaches furthest."""
    names = {op_name(node) for node in nodes}
    foreign = any(isinstance(n.target, compat.OpOverload) and n.target.namespace not in _OURS for n in nodes)
    if foreign or names & _LOOPS:
        return "scan"
    if names & _ATTENTIONS or names & _PRODUCTS:
        return "linear_attention"
    if names & _SCANS:
        return "scan"
    if names & _PLACED:
        return "recurrence"
    if names & {*_CONVOLUTIONS, "unfold"}:
        return "convolution"
    return "shift" if names <= {"pad", "cat", "roll", "flip"} else "reduction"


def token_mixers(
    stack: LayerStack, stream: Set[Node], markers: Collection[Node], blocks: Iterable[int]
) -> dict[Node, str]:
    """Nodes that pass the gradient of one position on to others although nothing is stopped there, with their modules.

    Operators of other libraries count as such, but for products with quantised weights. Looked at are the given blocks
    and what comes before the first one.
    """
    size = shape_of(stack.source)[1]
    found: dict[Node, str] = {}
    for node in ancestors([stack.source]) & stream - {stack.source}:
        # a prompt in front of the tokens moves them, at most; what an encoder mixes are no tokens, but images, say
        if op_name(node) not in JOINS and _on_tokens(node, size) and _mixes(node, stream, size):
            found[node] = module_of(node) or "the embedding"
    for i in blocks:
        block = stack.blocks[i]
        core = {node for attention in block.attentions for node in attention_core(attention)}
        # from the embedding's values, not from their sizes (``zeros_like``)
        inside = descendants([block.input], [block.output, *markers], lambda n: n in stream or n in markers)
        inside &= ancestors([block.output])
        for node in inside - core - {block.input, *markers}:
            if _mixes(node, stream, size):
                found[node] = module_of(node) or block.name
    order = {node: i for i, node in enumerate(stack.source.graph.nodes)}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def _mixes(node: Node, stream: Set[Node], length: Any) -> bool:
    name = op_name(node)
    if name in _CONVOLUTIONS:
        return any(size != 1 for size in shape_of(argument(node, 1, "weight"))[2:])
    if name in _PRODUCTS:
        # one product per position, such as the weighted sum of its experts, mixes none
        return sum(source in stream for source in node.all_input_nodes) > 1 and not _per_position(node, stream, length)
    if name in _ATTENTIONS or name in _LOOPS or name == "unfold":  # windows, of positions mostly
        return True
    if isinstance(node.target, compat.OpOverload) and node.target.namespace not in _OURS:
        return not is_quantised_product(node)
    if name in _PLACED:  # a value of every position, put together from those of single ones
        return any(same_size(shape_of(node)[axis], length) for axis in _axes(_dims(node, name), len(shape_of(node))))
    source = next((n for n in node.all_input_nodes if n in stream), None)
    if name == "cat":  # with an empty cache nothing moves
        axis = _token_axis(node, length)
        at = _axes(argument(node, 1, "dim", 0), len(shape_of(node)))
        return source is not None and axis in at and not same_size(shape_of(source)[axis], length)
    axis = None if source is None else _token_axis(source, length)
    if source is None or axis is None:
        return False
    if name == "pad":  # a shift; one that only makes room at an end moves nothing
        amounts: Any = argument(node, 1, "pad", ())
        after = 2 * (len(shape_of(node)) - 1 - axis)
        return any(isinstance(amount, int) and amount < 0 for amount in amounts[after : after + 2])
    return name in _ALONG and axis in _axes(_dims(node, name), len(shape_of(source)))


def _per_position(node: Node, stream: Set[Node], length: Any) -> bool:
    """Whether a product is one of each position: of tensors [B * S, ...] or [B, S, ...], batched."""
    sources = [shape_of(source) for source in node.all_input_nodes if source in stream]
    if op_name(node) == "matmul" and all(len(shape) > 3 for shape in sources):
        first, *others = (shape[:2] for shape in sources)
        by_position = same_size(first[1], length) and all(map(same_size, first * len(others), sum(others, ())))
        return by_position and not any(same_size(size, length) for shape in sources for size in shape[2:])
    if op_name(node) not in ("bmm", "matmul", "baddbmm") or any(len(shape) != 3 for shape in sources):
        return False
    firsts = {shape[0] for shape in sources}
    return len(firsts) == 1 and not any(same_size(size, length) for shape in sources for size in shape[1:])


def _on_tokens(node: Node, length: Any) -> bool:
    """Whether a call works on something that has an axis of the sequence's length behind its first one."""
    shapes = [shape_of(n) for n in (node, *node.all_input_nodes)]
    return any(same_size(size, length) for shape in shapes for size in shape[1:])


def _token_axis(node: Node, length: Any) -> int | None:
    """Of [B, S, ...] or [B, heads, S, D]."""
    shape = shape_of(node)
    return next((axis for axis in (1, 2) if axis < len(shape) - 1 and same_size(shape[axis], length)), None)


def _dims(node: Node, name: str) -> Any:
    if name == "roll":
        return argument(node, 2, "dims", ())
    if name in ("norm", "select_scatter", "slice_scatter"):
        return argument(node, 2, "dim", 0 if name != "norm" else ())
    if name == "stack":
        return argument(node, 1, "dim", 0)
    if name == "flip":
        dims = argument(node, 1, "dims", ())
        return node.args[1:] if isinstance(dims, int) else dims  # x.flip(1, 2)
    return argument(node, 1, "dim", ())


def _axes(dims: Any, rank: int) -> list[int]:
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    return [dim % rank for dim in dims if isinstance(dim, int)]
