from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from cggr_compile.ops import UnresolvedMarkerError
from cggr_compile.passes.joint.resolve_markers import ResolveMarkers
from cggr_compile.passes.joint.row_sparse import RowSparseBackward

ops = torch.ops.cggr


def joint(gather: bool = True):
    """Forward and backward of ``gather(stop(x) * 2)``, x laid out [B, heads, S, D] and [B, S, H]."""

    def program(x, rows, keep, tangent):
        heads = ops.detach_unselected(x.view(2, 6, 2, 2).transpose(1, 2), 2)
        flat = heads.transpose(1, 2).reshape(2, 6, 4)
        mixed = torch.cumsum(flat, 1)  # every row receives gradient
        out = ops.gather_rows(mixed, rows, keep) if gather else mixed[:, :2]
        return torch.autograd.grad(out, x, tangent)[0]

    x = torch.randn(2, 6, 4, requires_grad=True)
    rows, keep = torch.tensor([[1, 4], [2, 0]]), torch.tensor([[True, True], [True, False]])
    arguments = (x, rows, keep, torch.randn(2, 2, 4))
    return make_fx(program, tracing_mode="fake")(*arguments), arguments


def test_masks_unselected_rows():
    gm, arguments = joint()
    result = ResolveMarkers()(gm.graph)
    assert result.matched and result.details == {"markers": 1}
    gm.graph.lint()
    gm.recompile()
    assert not any("detach_unselected" in str(n.target) for n in gm.graph.nodes)
    grad = gm(*arguments)
    assert grad[0].abs().sum(-1).nonzero().flatten().tolist() == [1, 4]
    assert grad[1].abs().sum(-1).nonzero().flatten().tolist() == [2]
    # the kept rows have the plain gradient
    x, rows, keep, tangent = arguments
    leaf = x.detach().requires_grad_()
    ops.gather_rows(torch.cumsum(leaf, 1), rows, keep).backward(tangent)
    torch.testing.assert_close(grad[0, [1, 4]], leaf.grad[0, [1, 4]])


def test_control_inert_marker_fails():
    """The marker matters: dropping it, instead of resolving it, gives another gradient."""
    gm, arguments = joint()
    for node in list(gm.graph.nodes):
        if "detach_unselected" in str(node.target):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
    gm.recompile()
    inert = gm(*arguments)
    resolved, _ = joint()
    ResolveMarkers()(resolved.graph)
    resolved.recompile()
    assert (inert - resolved(*arguments)).abs().max() > 0.1


def test_idempotent():
    gm, _ = joint()
    ResolveMarkers()(gm.graph)
    assert not ResolveMarkers()(gm.graph).matched


def two_selections(mixed: bool = False):
    """Two hidden states with rows, factors and a marker each; ``mixed``: the second is computed from the first."""

    def program(x, y, rows, keep, factors, tangents):
        a, b = (torch.cumsum(ops.detach_unselected(h, 1), 1) for h in (x, y))
        scaled = ops.scale_selected_grads(rows[1], factors)
        outs = [ops.gather_rows(a, rows[0], keep), ops.gather_rows(a + b if mixed else b, scaled, keep)]
        return torch.autograd.grad(outs, (x, y), tangents)

    x, y = torch.randn(2, 6, 4, requires_grad=True), torch.randn(2, 6, 4, requires_grad=True)
    rows, keep = torch.tensor([[[1, 4], [2, 0]], [[3, 5], [1, 2]]]), torch.tensor([[True, True], [True, False]])
    factors = torch.tensor([[2.0, 3], [4, 5]])
    arguments = (x, y, [*rows], keep, factors, [torch.randn(2, 2, 4) for _ in range(2)])
    return make_fx(program, tracing_mode="fake")(*arguments), arguments


@pytest.mark.parametrize("on_rows", [False, True])
def test_every_marker_gets_the_rows_of_its_own_forward(on_rows):
    gm, (x, y, rows, keep, factors, tangents) = two_selections()
    if on_rows:
        result = RowSparseBackward()(gm.graph)
        assert result.matched, result.reason
    ResolveMarkers()(gm.graph)
    gm.graph.lint()
    gm.recompile()
    got = gm(x, y, rows, keep, factors, tangents)
    for grad, hidden, own, weigh, tangent in zip(got, (x, y), rows, (None, factors), tangents, strict=True):
        leaf = hidden.detach().requires_grad_()
        ops.gather_rows(torch.cumsum(leaf, 1), own, keep).backward(tangent)
        ones = keep.float() if weigh is None else keep * weigh
        mask = torch.zeros(2, 6).scatter_add(1, own, ones)
        torch.testing.assert_close(grad, leaf.grad * mask[..., None])


def test_gradient_of_several_selections_is_not_told_apart():
    """Then nothing is carried on rows."""
    gm, _ = two_selections(mixed=True)
    result = RowSparseBackward()(gm.graph)
    assert not result.matched and result.reason == "several selections in one joint graph"


def test_markers_without_rows_raise():
    gm, _ = joint(gather=False)
    with pytest.raises(UnresolvedMarkerError, match="gather_rows"):
        ResolveMarkers()(gm.graph)
