"""Computes small products of the backward pass together: those that share an input, those that are summed."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from cggr_compile import compat
from cggr_compile.passes.base import JointPass, PassResult
from cggr_compile.passes.fx import Emitter, backward_of, is_static
from cggr_compile.passes.nodes import fake_value, shape_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch.fx import Graph

aten = torch.ops.aten
VIEWS = (aten.view.default, aten._unsafe_view.default)
# Columns of a product that fill a device by themselves: merging wider ones gains nothing, and the elementwise
# kernels in front of them (a gated activation has two outputs) would have to be written into one buffer.
MAX_MERGED_COLUMNS = 1024
# Multiplications of a weight gradient up to which it takes hardly longer than a launch: 2 us on an H100.
MAX_MERGED_MACS = 2**29


@dataclass(frozen=True)
class Product:
    """``weight_grad = mm(grad.T, x)``: the gradient of the weight of ``y = x W^T``, from the gradient of y."""

    grad: Node  # [R, N]
    weight_grad: Node  # [N, H]

    @property
    def multiplications(self) -> int:
        return math.prod((*shape_of(self.grad), shape_of(self.weight_grad)[1]))


class MergeProducts(JointPass):
    """Merges the products of linear layers with one input, such as the projections to queries, keys and values.

    Before::

        dWq = mm(dq.T, x); dWk = mm(dk.T, x); dWv = mm(dv.T, x)
        dx = mm(dq, Wq) + mm(dk, Wk) + mm(dv, Wv)

    After::

        d = cggr.concat_in_place([dq, dk, dv], 1)
        dWq, dWk, dWv = split(mm(d.T, x))
        dx = mm(d, cat([Wq, Wk, Wv]))

    Exact up to the rounding of a sum: dx is accumulated inside one product instead of rounded three times. Few heads
    make narrow products that leave most of a device idle, and each is a launch of its own. Of wide ones (gate and up)
    only the weight gradients are merged, and only where there are so few rows that their launches count.
    """

    name = "merge_products"
    optional = True

    def __call__(self, graph: Graph) -> PassResult:
        groups = _groups(graph)
        summed = 0
        for x, products in groups:
            summed += _merge(graph, x, products)
        if groups:
            compat.sort_stably(graph)
        sums = _sums(graph)
        for root, terms in sums:
            _merge_sum(graph, root, terms)
        if not groups and not sums:
            return PassResult(False, "no small products share an input or a sum")
        compat.sort_stably(graph)
        graph.eliminate_dead_code()
        count, summed = sum(len(products) for _, products in groups), summed + len(sums)
        reason = f"{count} weight gradients in {len(groups)} products; {summed} sums of input gradients, each in one"
        return PassResult(True, reason)


def _groups(graph: Graph) -> list[tuple[Node, list[Product]]]:
    order = {node: position for position, node in enumerate(graph.nodes)}
    backward = backward_of(graph)  # a product of the forward pass may look the same, and has to stay there
    sharing: dict[tuple[Node, tuple[int, ...], torch.dtype], list[tuple[Node, Product]]] = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=aten.mm.default):
        left, x = node.args
        transposed = left.target is aten.permute.default and list(left.args[1]) == [1, 0]
        if node in backward and transposed and is_static(left, x):
            key = (_behind_views(x), tuple(shape_of(x)), fake_value(x).dtype)
            sharing[key].append((x, Product(left.args[0], node)))
    found = []
    for members in sharing.values():
        products: list[Product] = []
        for _, product in sorted(members, key=lambda member: order[member[1].grad]):
            if not any(p.grad is product.grad or _leads_to(p.grad, product.grad, order) for p in products):
                products.append(product)
        if len(products) > 1 and (
            _narrow(p.grad for p in products) or all(p.multiplications <= MAX_MERGED_MACS for p in products)
        ):
            found.append((members[0][0], products))
    return found


def _width(grad: Node) -> int:
    return int(shape_of(grad)[1])


def _narrow(grads: Iterable[Node]) -> bool:
    return min(_width(grad) for grad in grads) < MAX_MERGED_COLUMNS


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
    grads = [product.grad for product in products]
    inputs = [_input_grad(grad) for grad in grads]
    with emit.before(last, MergeProducts.name):
        together = _side_by_side(emit, grads)
        weight_grads = emit.call(aten.mm.default, emit.call(aten.permute.default, together, [1, 0]), x)
        rows_of_each = _split(emit, weight_grads, 0, grads)
    for product, rows in zip(products, rows_of_each, strict=True):
        product.weight_grad.replace_all_uses_with(rows)
    root = _sum_of(inputs) if _narrow(grads) else None  # putting wide weights together takes longer than it saves
    if root is None:
        return False
    _replace_sum(emit, root, together, [node.args[1] for node in inputs if node is not None])
    return True


def _side_by_side(emit: Emitter, parts: Sequence[Node]) -> Node:
    """The parts side by side; whoever else reads one of them reads its columns there."""
    together = emit.call(torch.ops.cggr.concat_in_place.default, list(parts), 1)
    for part, columns in zip(parts, _split(emit, together, 1, parts), strict=True):
        part.replace_all_uses_with(columns, delete_user_cb=lambda user: user is not together)
    return together


def _split(emit: Emitter, whole: Node, axis: int, grads: Sequence[Node]) -> list[Node]:
    """``whole`` cut along ``axis`` into one piece for every gradient, as long as that is wide."""
    ends = list(itertools.accumulate(map(_width, grads)))
    return [emit.call(aten.slice.Tensor, whole, axis, *ends_of) for ends_of in itertools.pairwise([0, *ends])]


def _replace_sum(emit: Emitter, root: Node, together: Node, weights: Sequence[Any]) -> None:
    with emit.before(root, MergeProducts.name):
        joined = emit.call(aten.cat.default, list(weights))
        compat.keep_in_backward(joined)
        product_of_all = emit.shaped(emit.call(aten.mm.default, together, joined), shape_of(root))
    root.replace_all_uses_with(product_of_all)


@dataclass(frozen=True)
class Term:
    """``mm(grad, W)``, with those rows set to zero where ``mask`` is False."""

    product: Node
    mask: Node | None = None  # [R, 1], or with the rows' axes apart

    @property
    def grad(self) -> Node:
        return self.product.args[0]  # type: ignore[return-value]


def _sums(graph: Graph) -> list[tuple[Node, list[Term]]]:
    """What adds up narrow products of the backward pass and nothing else: the last addition, and the products.

    Such are left where weight gradients are of other rows than the input's, as those of keys and values are with
    ``kv_gradient="project"``.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    backward = backward_of(graph)
    found: dict[Node, list[Term]] = {}
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        if node.kwargs or node not in backward or shape_of(node.args[0]) != shape_of(node.args[1]):
            continue
        left, right = (_added(operand, found) for operand in node.args)
        if left and right:
            products = {term.product for term in (*left, *right)}
            for part in [part for part, terms in found.items() if any(term.product in products for term in terms)]:
                del found[part]  # not the whole sum
            found[node] = [*left, *right]
    return [(root, terms) for root, terms in found.items() if _mergeable(terms, order)]


def _added(operand: Any, sums: dict[Node, list[Term]]) -> list[Term]:
    """The products that an operand of an addition is the sum of, if it is, and they are used for nothing else."""
    node: Any = operand
    mask: Any = None
    while isinstance(node, Node) and len(node.users) == 1 and (node.target in VIEWS or _masked(node)):
        if node.target is aten.where.self:
            if mask is not None:
                return []
            mask, node = node.args[:2]
        else:
            node = node.args[0]
    if not isinstance(node, Node) or len(node.users) != 1:
        return []
    if node.target is aten.mm.default:
        return [Term(node, mask)]
    terms = sums.get(node, [])
    if mask is None:
        return terms
    return [Term(term.product, mask) for term in terms] if all(term.mask is None for term in terms) else []


def _masked(node: Node) -> bool:
    """Whether a call sets whole rows to zero."""
    if node.target is not aten.where.self:
        return False
    mask, values, zero = node.args
    rows = math.prod(shape_of(values)[:-1])
    is_zero = isinstance(zero, Node) and zero.target is aten.full.default and zero.args[1] == 0.0
    return bool(is_zero) and shape_of(mask)[-1] == 1 and math.prod(shape_of(mask)) == rows


def _mergeable(terms: list[Term], order: dict[Node, int]) -> bool:
    grads = [term.grad for term in terms]
    if len(set(grads)) < len(grads) or not is_static(*grads) or len({shape_of(grad)[0] for grad in grads}) > 1:
        return False
    if not _narrow(grads) or any(g.target is aten.slice.Tensor for g in grads):
        return False
    grads.sort(key=lambda grad: order[grad])
    return not any(_leads_to(a, b, order) for i, a in enumerate(grads) for b in grads[i + 1 :])


def _merge_sum(graph: Graph, root: Node, terms: list[Term]) -> None:
    emit = Emitter(graph, fake_value(root).fake_mode, key="val")
    weights = [term.product.args[1] for term in terms]
    with emit.before(root, MergeProducts.name):
        together = _side_by_side(emit, [_with_zeros(emit, term) for term in terms])
    _replace_sum(emit, root, together, weights)


def _with_zeros(emit: Emitter, term: Term) -> Node:
    """The gradient itself with zeros where the product is to be zero."""
    if term.mask is None:
        return term.grad
    return emit.masked(emit.call(aten.view.default, term.mask, [shape_of(term.grad)[0], 1]), term.grad)


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
