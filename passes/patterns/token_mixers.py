"""Finds what mixes tokens inside the blocks without being attention: convolutions, scans, linear attention, shifts."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Set
from typing import TYPE_CHECKING, Any

from cggr_compile import compat
from cggr_compile.passes.facts import Attention, LayerStack
from cggr_compile.passes.fx import ancestors, descendants
from cggr_compile.passes.nodes import argument, module_of, op_name, same_size, shape_of
from cggr_compile.passes.patterns.quantised import is_quantised_product

if TYPE_CHECKING:
    from torch.fx import Node

_ALONG = {"cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "roll", "flip"} | {
    *("mean", "sum", "amax", "amin", "var", "std", "norm", "softmax", "log_softmax", "logsumexp")
}
_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}
_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d", "convolution"}
_ATTENTIONS = {"scaled_dot_product_attention", "flex_attention"}
_LOOPS = {"scan", "associative_scan", "while_loop", "triton_kernel_wrapper_functional"}
_OURS = ("aten", "prims", "cggr")


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
        if op_name(node) != "cat" and _on_tokens(node, size) and _mixes(node, stream, size):
            found[node] = module_of(node) or "the embedding"
    for i in blocks:
        block = stack.blocks[i]
        inside = descendants([block.input], stop=[block.output, *markers]) & ancestors([block.output])
        for node in inside - _core(block.attention) - {block.input, *markers}:
            if _mixes(node, stream, size):
                found[node] = module_of(node) or block.name
    order = {node: i for i, node in enumerate(stack.source.graph.nodes)}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def _core(attention: Attention) -> Set[Node]:
    """What is attention itself: from what reads the keys to the call that has read keys and values."""
    behind = descendants([attention.node]) & descendants([attention.value_user])
    last = next(node for node in attention.node.graph.nodes if node in behind)
    return {attention.node, *descendants([attention.key_user]) & ancestors([last])}


def _mixes(node: Node, stream: Set[Node], length: Any) -> bool:
    name = op_name(node)
    if name in _CONVOLUTIONS:
        return any(size != 1 for size in shape_of(argument(node, 1, "weight"))[2:])
    if name in _PRODUCTS:
        return sum(source in stream for source in node.all_input_nodes) > 1
    if name in _ATTENTIONS or name in _LOOPS:
        return True
    if isinstance(node.target, compat.OpOverload) and node.target.namespace not in _OURS:
        return not is_quantised_product(node)
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
    if name == "norm":
        return argument(node, 2, "dim", ())
    if name == "flip":
        dims = argument(node, 1, "dims", ())
        return node.args[1:] if isinstance(dims, int) else dims  # x.flip(1, 2)
    return argument(node, 1, "dim", ())


def _axes(dims: Any, rank: int) -> list[int]:
    dims = dims if isinstance(dims, (list, tuple)) else [dims]
    return [dim % rank for dim in dims if isinstance(dim, int)]
