"""Computes small products of the backward pass together: those that share an input, those that are summed."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from cggr_compile import compat
from cggr_compile.passes.base import PassResult, fake_value, shape_of
from cggr_compile.passes.fx import Emitter, sort_stably

if TYPE_CHECKING:
    from torch.fx import Graph

aten = torch.ops.aten
VIEWS = (aten.view.default, aten._unsafe_view.default)
# Columns of a product that fill a device by themselves: nothing is won by merging wider ones, and the elementwise
# kernels in front of them (a gated activation has two outputs) would have to be written into one buffer.
WIDE = 1024
# Multiplications of a weight gradient up to which it takes hardly longer than a launch: 2 us on an H100.
SMALL = 2**29


@dataclass(frozen=True)
class Product:
    """``weight_grad = mm(grad.T, x)``: the gradient of the weight of ``y = x W^T``, from the gradient of y."""

    grad: Node  # [R, N]
    weight_grad: Node  # [N, H]

    @property
    def width(self) -> int:
        return int(shape_of(self.grad)[1])

    @property
    def multiplications(self) -> int:
        return math.prod((*shape_of(self.grad), shape_of(self.weight_grad)[1]))


class MergeProducts:
    """Merges the products of linear layers with one input, such as the projections to queries, keys and values.

    Before::

        dWq = mm(dq.T, x); dWk = mm(dk.T, x); dWv = mm(dv.T, x)
        dx = mm(dq, Wq) + mm(dk, Wk) + mm(dv, Wv)

    After::

        d = cggr.join_columns([dq, dk, dv])
        dWq, dWk, dWv = split(mm(d.T, x))
        dx = mm(d, cat([Wq, Wk, Wv]))

    Exact up to the rounding of a sum: dx is accumulated inside one product instead of rounded three times. Few heads
    make narrow products that leave most of a device idle, and each is a launch of its own. Of wide ones (gate and up)
    only the weight gradients are merged, and only where there are so few rows that their launches count.
    """

    name = "merge_products"

    def __call__(self, graph: Graph) -> PassResult:
        groups = _groups(graph)
        summed = 0
        for x, products in groups:
            summed += _merge(graph, x, products)
        if groups:
            sort_stably(graph)
            graph.eliminate_dead_code()
        count = sum(len(products) for _, products in groups)
        reason = f"{count} weight gradients in {len(groups)} products; {summed} sums of input gradients, each in one"
        return PassResult(bool(groups), reason if groups else "no narrow products share an input")


def _groups(graph: Graph) -> list[tuple[Node, list[Product]]]:
    order = {node: position for position, node in enumerate(graph.nodes)}
    sharing: dict[tuple[Node, tuple[int, ...], torch.dtype], list[tuple[Node, Product]]] = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=aten.mm.default):
        left, x = node.args
        if left.target is aten.permute.default and list(left.args[1]) == [1, 0] and _static(left, x):
            key = (_behind_views(x), tuple(shape_of(x)), fake_value(x).dtype)
            sharing[key].append((x, Product(left.args[0], node)))
    found = []
    for members in sharing.values():
        products: list[Product] = []
        for _, product in sorted(members, key=lambda member: order[member[1].grad]):
            if not any(p.grad is product.grad or _leads_to(p.grad, product.grad, order) for p in products):
                products.append(product)
        if len(products) > 1 and (_narrow(products) or all(p.multiplications <= SMALL for p in products)):
            found.append((members[0][0], products))
    return found


def _narrow(products: list[Product]) -> bool:
    return min(product.width for product in products) < WIDE


def _static(*nodes: Node) -> bool:
    return all(isinstance(size, int) for node in nodes for size in shape_of(node))


def _behind_views(node: Node) -> Node:
    while node.target in VIEWS:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _leads_to(source: Node, target: Node, order: dict[Node, int]) -> bool:
    """Whether ``target`` is computed from ``source``, which comes earlier."""
    todo, seen = [source], {source}
    while todo:
        for user in todo.pop().users:
            if user is target:
                return True
            if order[user] < order[target] and user not in seen:
                seen.add(user)
                todo.append(user)
    return False


def _merge(graph: Graph, x: Node, products: list[Product]) -> bool:
    """Merges the products; True if the input's gradient became one product too."""
    emit = Emitter(graph, fake_value(x).fake_mode, key="val")
    last = products[-1].weight_grad
    with emit.before(last, MergeProducts.name):
        together = emit.call(torch.ops.cggr.join_columns.default, [product.grad for product in products])
        weight_grads = emit.call(aten.mm.default, emit.call(aten.permute.default, together, [1, 0]), x)
    begin = 0
    inputs: list[Node | None] = []
    for product in products:
        end = begin + product.width
        with emit.before(last, MergeProducts.name):
            columns = emit.call(aten.slice.Tensor, together, 1, begin, end)
            rows = emit.call(aten.slice.Tensor, weight_grads, 0, begin, end)
        product.weight_grad.replace_all_uses_with(rows)
        inputs.append(_input_grad(product.grad))
        product.grad.replace_all_uses_with(columns, delete_user_cb=lambda user: user is not together)
        begin = end
    root = _sum_of(inputs) if _narrow(products) else None  # putting wide weights together takes longer than it saves
    if root is None:
        return False
    with emit.before(root, MergeProducts.name):
        weights = emit.call(aten.cat.default, [node.args[1] for node in inputs if node is not None])
        compat.keep_in_backward(weights)
        product_of_all = emit.call(aten.mm.default, together, weights)
        if root.target is not aten.mm.default and shape_of(root) != shape_of(product_of_all):
            product_of_all = emit.call(aten.view.default, product_of_all, list(shape_of(root)))
    root.replace_all_uses_with(product_of_all)
    return True


def _input_grad(grad: Node) -> Node | None:
    """The one product ``mm(grad, W)``."""
    found = [user for user in grad.users if user.target is aten.mm.default and user.args[0] is grad]
    return found[0] if len(found) == 1 else None


def _sum_of(terms: list[Node | None]) -> Node | None:
    """The node that adds up all of ``terms``, and nothing else, through views and additions."""
    if None in terms or len(set(terms)) != len(terms):
        return None
    open_ends: list[Node] = [_through_views(node) for node in terms if node is not None]
    while len(open_ends) > 1:
        for node in open_ends:
            total: Any = next(iter(node.users)) if len(node.users) == 1 else None
            if total is None or total.target is not aten.add.Tensor or total.kwargs:
                continue
            left, right = total.args
            if left is not right and left in open_ends and right in open_ends:
                open_ends = [end for end in open_ends if end is not left and end is not right]
                open_ends.append(_through_views(total))
                break
        else:
            return None
    return open_ends[0]


def _through_views(node: Node) -> Node:
    while len(node.users) == 1 and (user := next(iter(node.users))).target in VIEWS:
        node = user
    return node
