"""The first half of the pass: it says what is on rows and what becomes of each call, and changes nothing."""

from __future__ import annotations

import operator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph

import cggr_compile.ops  # noqa: F401
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.joint.row_sparse import RowSparseBackward
from cggr_compile.passes.joint.row_sparse.annotations import Annotations
from cggr_compile.passes.joint.row_sparse.plan import At, Call, Densify
from cggr_compile.passes.joint.row_sparse.rules import RULES, rule_of
from cggr_compile.passes.joint.row_sparse.rules.elementwise import Elementwise
from cggr_compile.passes.joint.row_sparse.rules.views import View

aten = torch.ops.aten
B, S, K, H = 2, 6, 3, 4
TOKENS = ("B", "S", None)


@pytest.fixture
def emit():
    return Emitter(Graph(), FakeTensorMode(), key="val")


def placeholder(emit, name, *shape, dtype=torch.float32):
    node = emit.graph.placeholder(name)
    with emit.fake_mode:
        node.meta["val"] = torch.empty(shape, dtype=dtype)
    return node


def annotations(**layouts):
    at = Annotations(B, S, K)
    at.layouts.update(layouts)
    return at


def backward_pass(emit):
    """The gradient of a product behind the loss: marker, weight gradient, input gradient, an operator without rule."""
    weight, x = placeholder(emit, "weight", H, H), placeholder(emit, "x", B * S, H)
    rows = placeholder(emit, "rows", B, K, dtype=torch.int64)
    keep = placeholder(emit, "keep", B, K, dtype=torch.bool)
    grad = placeholder(emit, "grad", B, K, H)
    seed = emit.call(torch.ops.cggr.scatter_rows.default, grad, rows, keep, S)
    flat = emit.call(aten.view.default, seed, [B * S, H])
    across = emit.call(aten.permute.default, flat, [1, 0])
    of_weight = emit.call(aten.mm.default, across, x)
    of_input = emit.call(aten.mm.default, flat, weight)
    unknown = emit.call(aten.cumsum.default, of_input, 1)
    emit.graph.output((of_weight, unknown))
    return dict(x=x, seed=seed, flat=flat, across=across, of_weight=of_weight, of_input=of_input, unknown=unknown)


def test_says_what_becomes_of_each_call(emit):
    node = backward_pass(emit)
    at = annotations()
    before = str(emit.graph)
    at.annotate(emit.graph.nodes)
    assert str(emit.graph) == before
    rows = ("BS", None)
    assert at.layouts == {
        node["seed"]: TOKENS,
        node["flat"]: rows,
        node["across"]: (None, "BS"),
        node["of_input"]: rows,
    }
    assert at.plans[node["of_weight"]] == Call((At(node["across"], (None, "BS")), At(node["x"], rows)), None)
    assert at.plans[node["unknown"]] == Densify((node["of_input"],))
    assert at.densified == {node["unknown"]: 1}


def test_and_the_second_half_does_it(emit):
    node = backward_pass(emit)
    result = RowSparseBackward()(emit.graph)
    assert result.details["densified"] == {"aten.cumsum.default": 1} and result.reason.startswith("4 values on rows")
    emit.graph.lint()
    products = [tuple(n.meta["val"].shape) for n in emit.graph.nodes if n.target is aten.mm.default]
    assert products == [(H, H), (B * K, H)]
    assert node["of_weight"] not in emit.graph.nodes


VIEWS = {
    "view": (aten.view.default, (B, S, H), ([B * S, H],), TOKENS, ("BS", None)),
    "split heads": (aten.view.default, (B, S, H), ([B, S, 2, 2],), TOKENS, ("B", "S", None, None)),
    "unsafe view": (aten._unsafe_view.default, (B * S, H), ([B, S, H],), ("BS", None), TOKENS),
    "permute": (aten.permute.default, (B, S, 2, 2), ([0, 2, 1, 3],), ("B", "S", None, None), ("B", None, "S", None)),
    "permute-behind": (aten.permute.default, (B, S, 2, 2), ([0, 2, 1, -1],), (*TOKENS, None), ("B", None, "S", None)),
    "unsqueeze": (aten.unsqueeze.default, (B, S, H), (-1,), TOKENS, (*TOKENS, None)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_go_both_ways(emit, name):
    target, shape, args, before, after = VIEWS[name]
    x = placeholder(emit, "x", *shape)
    node, at = emit.call(target, x, *args), annotations()
    rule = rule_of(target)
    assert isinstance(rule, View)
    assert rule.result(at, node, before) == after and rule.source(at, node, after) == before


@pytest.mark.parametrize("target", [aten.view.default, aten.permute.default, aten.unsqueeze.default])
def test_every_view_that_rows_go_back_through_is_in_that_list(target):
    assert target in {view[0] for view in VIEWS.values()}
    both = {target for target, rule in RULES.items() if isinstance(rule, View) and type(rule).source is not View.source}
    assert both == {view[0] for view in VIEWS.values()}


def test_pointwise_operators_are_known_by_their_tag():
    for target in (aten.silu.default, aten.maximum.default, aten.clamp.default):
        assert target not in RULES and type(rule_of(target)) is Elementwise
    for target in (aten.bernoulli.p, aten.cumsum.default, aten.sort.default, aten.neg_.default, operator.add):
        assert not isinstance(rule_of(target), Elementwise), target


def test_a_pointwise_operator_is_computed_on_rows(emit):
    """Of forward values; a gradient does not go through, because f(0) may be anything."""
    x, scale = placeholder(emit, "x", B, S, H), placeholder(emit, "scale", H)
    node, at = emit.call(aten.maximum.default, x, scale), annotations()
    assert rule_of(node.target).recompute(at, node, TOKENS) == Call((At(x, TOKENS), At(scale, (None,))), TOKENS)
    at.layouts[x] = TOKENS
    at.annotate([node])
    assert at.plans[node] == Densify((x,))


def test_a_scaled_sum_with_zeros_is_not_its_operand(emit):
    x = placeholder(emit, "x", B, S, H)
    zeros = emit.call(aten.full.default, [B, S, H], 0, dtype=torch.float32, device="cpu")
    for alpha, handled in ((1, True), (2, False)):
        node = emit.call(aten.add.Tensor, zeros, x, alpha=alpha)
        at = annotations()
        at.layouts[x] = TOKENS
        at.annotate([node])
        assert (node in at.layouts) == handled
