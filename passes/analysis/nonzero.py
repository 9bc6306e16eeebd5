"""Where a value is not zero, which is where the other factors of a product with it act."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from cggr_compile.passes.analysis.positions import WHOLE, Holding
from cggr_compile.passes.analysis.products import ELEMENTWISE, product_of
from cggr_compile.passes.analysis.uses import RULES, Operands, Place, Use, table_of
from cggr_compile.passes.nodes import fake_value, op_name, shape_of

Question = tuple[Node, Use, bool]  # see _nonzero
# The answer, computed by asking others; in a loop, as no stack is deep enough for an image encoder.
Steps = Generator[Question, list[Use], list[Use]]


def whole(place: Place, node: Node, use: Use, strict: bool) -> bool:
    """Whether a value is zero nowhere, as far as the graph says; see :func:`_nonzero`."""
    return _answered(place, _asking((node, use, strict))) == [use]


def _asking(question: Question) -> Steps:
    return (yield question)


def _answered(place: Place, steps: Steps) -> list[Use]:
    stack: list[tuple[Question | None, Steps]] = [(None, steps)]
    answer: Any = None
    while True:
        asked, steps = stack[-1]
        try:
            wanted = steps.send(answer)
        except StopIteration as end:
            stack.pop()
            if asked is None:
                return list(end.value)
            answer = place.found[asked] = _joined(asked[1], end.value)
            continue
        answer = place.found.get(wanted)
        if answer is None:
            stack.append((wanted, _nonzero(place, *wanted)))


def _joined(use: Use, pieces: list[Use]) -> list[Use]:
    found = list(dict.fromkeys(replace(use, region=p.region, narrower=p.narrower) for p in pieces))
    if use in found:
        return [use]
    return found if len(found) <= _PIECES else [replace(use, narrower=True)]


def _nonzero(place: Place, node: Node, use: Use, strict: bool) -> Steps:
    """``use`` of a value, where that is not zero: in pieces, which together are the whole or less.

    What is computed from parameters (an embedding, say) is zero nowhere, but where something blanks it: a mask, a
    ``pad``, zeros in a ``cat``. Data is zero where its values are. ``strict``: data that tells no positions may be zero
    anywhere; else it is a block's own affair.
    """
    name = op_name(node)
    if use.kind == "shared" or name in _ZEROS:
        return [] if name in _ZEROS else [use]
    unknown = replace(use, narrower=True)
    if place.is_data(node):
        if use.kind == "rows":
            return [place.flagged(node, use, node, strict)]
        return [unknown if strict and len(shape_of(node)) > 1 else use]
    if node in place.stream or node.op in ("placeholder", "get_attr") or name in _FILL:
        return [use]
    if name in _ADD and any(isinstance(a, (int, float)) and a != 0 for a in node.args[_ADD[name] :]):
        return [use]  # with a number
    read = table_of(node)
    if read is not None:
        return (yield from _read(use, *read, strict))
    product = product_of(node, use)
    if product is not None:
        pieces = yield from _limited(use, product.factors, strict)
        for n in product.added:
            pieces = pieces + (yield n, place.broadcast(node, n, use), strict)
        return pieces
    rule = RULES.get(name) if use.kind == "rows" else None
    terms = rule(place, node, use) if rule is not None else None
    if terms is not None:
        found = []
        for term in terms:
            found.append((yield *term, strict))
        covered = name in _JOIN and len(terms) > 1 and found == [[part] for _, part in terms]
        return [use] if covered else [p for pieces in found for p in pieces]
    if use.kind == "mixed" and place.own_rows(node):
        own = Use("rows", WHOLE, axis=1)
        return [use if (yield node, own, False) == [own] else unknown]
    if not strict or not (node in place.before or place.flat(node)):
        return [use]
    filled = []
    for n in node.all_input_nodes:
        if name == "mul" or _no_index(n):
            filled.append((yield n, use.mixed(), strict) == [use.mixed()])
    return [use if all(filled) or (name in _ADD and any(filled)) else unknown]


def _read(use: Use, table: Node, index: Node, strict: bool) -> Steps:
    """Positions that read rows of a table which are not zero."""
    rows = yield table, Use("rows", WHOLE), strict
    if rows == [Use("rows", WHOLE)]:
        return [use]
    if use.kind != "rows" or use.axis >= len(shape_of(index)) or any(r.narrower for r in rows):
        return [replace(use, narrower=True)]
    held = [Holding(index, use.axis, use.first, r.region, shape_of(table)[0]) for r in rows]
    return [replace(use, region=use.region.where(condition)) for condition in held]


def _limited(use: Use, factors: Iterable[tuple[Node, int | None]], strict: bool) -> Steps:
    """``use``, where all the factors are not zero."""
    uses = [use]
    for factor, axis in factors:
        if axis is not None:
            pieces = []
            for u in uses:
                pieces += yield factor, replace(u, axis=axis), strict
            uses = pieces
    return [replace(u, axis=use.axis) for u in uses]


def multiplied(place: Place, node: Node, use: Use) -> Operands | None:
    """The rule of every operator in ``PRODUCTS``: each factor acts where the others are not zero."""
    product = product_of(node, use)
    if product is None:
        return None
    elementwise = op_name(node) in ELEMENTWISE
    if not elementwise and node not in place.before and any(len(shape_of(n)) > 3 for n, _ in product.factors):
        return None  # an attention
    strict = node in place.before or not elementwise
    found = [(n, place.broadcast(node, n, use)) for n in product.added]
    for i, (factor, axis) in enumerate(product.factors):
        others = product.factors[:i] + product.factors[i + 1 :]
        for piece in _answered(place, _limited(use, others, strict)):
            found.append((factor, piece.shared() if axis is None else replace(piece, axis=axis)))
    return found


def _no_index(node: Node) -> bool:
    value = fake_value(node)
    return not isinstance(value, torch.Tensor) or value.is_floating_point() or value.dtype == torch.bool


# Of more pieces than this, only that they are pieces is remembered.
_PIECES = 4
_ZEROS = ("zeros", "zeros_like", "new_zeros")
# not zero at zero
_FILL = ("exp", "sigmoid", "cos", "softmax", "softplus", "rsqrt", "reciprocal", "log", "ones_like")
# what adds to a value, or replaces it: from which argument on a number may be one
_ADD = {"add": 0, "sub": 0, "rsub": 0, "where": 1, "masked_fill": 2, "pad": 3}
# what together is the whole
_JOIN = ("cat", "concatenate", "hstack", "where", "masked_scatter")
