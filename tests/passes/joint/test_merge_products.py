"""Merged products of the backward pass: the same numbers from fewer products."""

from __future__ import annotations

import functools

import merging
import pytest
import torch

from cggr_compile.passes.joint.merge_products import MAX_MERGED_COLUMNS, MergeProducts

ROWS, WIDTH = 6, 5


def tensors(*widths, rows=ROWS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(rows, n, generator=generator, dtype=torch.float64) for n in widths]
    weights = [torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) for n in widths]
    return grads, weights, torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)


check = functools.partial(merging.check, MergeProducts(), torch.ops.aten.mm.default)


def linear_backward(tangents, weights, x):
    """dW of each layer, and dx."""
    inputs = [g @ w for g, w in zip(tangents, weights, strict=True)]
    return *(g.permute(1, 0) @ x for g in tangents), functools.reduce(torch.add, inputs)


def test_layers_that_share_an_input():
    gm, result = check(linear_backward, *tensors(3, 2, 2), before=6, after=2)
    assert result.reason == "3 weight gradients in 1 products; 1 sums of input gradients, each in one"
    (joined,) = (n for n in gm.graph.nodes if n.meta.get("partitioner_tag"))  # of the weights: not to be saved
    assert joined.target is torch.ops.aten.cat.default and tuple(joined.meta["val"].shape) == (7, WIDTH)


def test_through_views_in_any_order():
    def backward(tangents, weights, x):
        q, k, v = tangents
        wide = x.view(2, 3, WIDTH)
        dv = (v @ weights[2]).view(2, 3, WIDTH)
        dwv = v.permute(1, 0) @ wide.view(ROWS, WIDTH)
        dq = (q @ weights[0]).view(2, 3, WIDTH)
        dwq = q.permute(1, 0) @ wide.view(ROWS, WIDTH)
        dk = (k @ weights[1]).view(2, 3, WIDTH)
        return dwq, k.permute(1, 0) @ wide.view(ROWS, WIDTH), dwv, q.sum(0), dq + (dk + dv)

    check(backward, *tensors(3, 2, 2), before=6, after=2)


def test_an_input_gradient_used_on_its_own_stays():
    def backward(tangents, weights, x):
        *rest, dx = linear_backward(tangents, weights, x)
        return *rest, dx, (tangents[0] @ weights[0]).relu()

    check(backward, *tensors(3, 2), before=5, after=4)  # its product is found twice: which of them is dx's is open


def test_a_scaled_sum_is_not_a_sum():
    def backward(tangents, weights, x):
        a, b = (g @ w for g, w in zip(tangents, weights, strict=True))
        return tangents[0].permute(1, 0) @ x, tangents[1].permute(1, 0) @ x, torch.add(a, b, alpha=2)

    check(backward, *tensors(3, 2), before=4, after=3)


def test_frozen_layers_have_no_weight_gradient():
    def backward(tangents, weights, x):
        return (tangents[0] @ weights[0] + tangents[1] @ weights[1],)

    _, result = check(backward, *tensors(3, 2), before=2, after=1)
    assert result.reason == "0 weight gradients in 0 products; 1 sums of input gradients, each in one"


def test_other_inputs_are_other_products():
    def backward(tangents, weights, x):
        return tangents[0].permute(1, 0) @ x, tangents[1].permute(1, 0) @ (x * 2)

    check(backward, *tensors(3, 2), before=2, after=2)


def test_wide_products_stay(monkeypatch):
    monkeypatch.setattr("cggr_compile.passes.joint.merge_products.MAX_MERGED_MACS", 2 * MAX_MERGED_COLUMNS * WIDTH - 1)
    check(linear_backward, *tensors(MAX_MERGED_COLUMNS, MAX_MERGED_COLUMNS + 1, rows=2), before=4, after=4)
    check(linear_backward, *tensors(MAX_MERGED_COLUMNS, MAX_MERGED_COLUMNS - 1, rows=2), before=4, after=2)


def test_of_few_rows_wide_weight_gradients_are_merged_too():
    _, result = check(linear_backward, *tensors(MAX_MERGED_COLUMNS, MAX_MERGED_COLUMNS + 1, rows=2), before=4, after=3)
    assert result.reason == "2 weight gradients in 1 products; 0 sums of input gradients, each in one"


def test_products_of_the_forward_pass_stay():
    """They look like weight gradients, and are needed there."""

    def forward(rows, weights, x):
        return tuple(row.permute(1, 0) @ x for row in rows)

    check(forward, *tensors(3, 2), before=2, after=2)
    check(lambda tangents, weights, x: forward(tangents, weights, x), *tensors(3, 2), before=2, after=1)  # the control


def summed(tangents_1, tangents_2, tangents_3, weights, x):
    """dx of three layers, the weight gradient of one of them: the others' are of other rows."""
    dx = tangents_1 @ weights[0] + (tangents_2 @ weights[1] + tangents_3 @ weights[2]).view(2, 3, WIDTH).view(ROWS, -1)
    return tangents_1.permute(1, 0) @ x, dx, tangents_2.sum(0)


def test_a_sum_without_the_weight_gradients():
    grads, weights, x = tensors(3, 2, 4)
    gm, result = check(summed, *grads, weights, x, before=4, after=2)
    assert result.reason == "0 weight gradients in 0 products; 1 sums of input gradients, each in one"
    assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.cggr.concat_in_place.default)) == 1


def masked(tangents_1, tangents_2, tangents_3, weights, keep, zero):
    """Of two of three products some rows are set to zero, as those of unused slots are."""
    both = (tangents_2 @ weights[1] + tangents_3 @ weights[2]).view(2, 3, WIDTH)
    return (tangents_1 @ weights[0] + torch.where(keep, both, zero()).view(ROWS, WIDTH),)


def test_rows_set_to_zero_are_so_before_the_product():
    grads, weights, _ = tensors(3, 2, 4)
    keep = torch.tensor([True, False, True, True, True, False]).view(2, 3, 1)

    def none():
        return torch.full([], 0.0, dtype=torch.float64)

    def backward(tangents_1, tangents_2, tangents_3, weights, keep):
        return masked(tangents_1, tangents_2, tangents_3, weights, keep, none)

    check(backward, *grads, weights, keep, before=3, after=1)

    def ones(tangents_1, tangents_2, tangents_3, weights, keep):
        return masked(tangents_1, tangents_2, tangents_3, weights, keep, lambda: none() + 1)

    check(ones, *grads, weights, keep, before=3, after=2)  # the two inside

    def columns(tangents_1, tangents_2, tangents_3, weights, keep):
        return masked(tangents_1, tangents_2, tangents_3, weights, keep, none)

    check(columns, *grads, weights, torch.arange(5) < 3, before=3, after=2)


def in_the_forward(first, second, weights):
    return (first @ weights[0] + second @ weights[1],)


def plain_sum(tangents_1, tangents_2, weights):
    return (tangents_1 @ weights[0] + tangents_2 @ weights[1],)


def scaled(tangents_1, tangents_2, weights):
    return (torch.add(tangents_1 @ weights[0], tangents_2 @ weights[1], alpha=2),)


def used_elsewhere(tangents_1, tangents_2, weights):
    product = tangents_1 @ weights[0]
    return product + tangents_2 @ weights[1], product.relu()


def of_one_gradient(tangents_1, tangents_2, weights):
    return (tangents_1 @ weights[0] + tangents_1 @ (weights[0] * 2),)


def one_after_the_other(tangents_1, tangents_2, weights):
    later = (tangents_1.relu() @ weights[0]).relu()[:, :2] * tangents_2
    return (tangents_1 @ (weights[0] * 2) + later @ weights[1],)


def broadcast(tangents_1, tangents_2, weights):
    return (tangents_1 @ weights[0] + tangents_2[:1] @ weights[1],)


@pytest.mark.parametrize("function", [in_the_forward, scaled, used_elsewhere, of_one_gradient, broadcast])
def test_sums_that_stay(function):
    grads, weights, _ = tensors(3, 2)
    check(function, *grads, weights, before=2, after=2)
    check(plain_sum, *grads, weights, before=2, after=1)  # the control


def test_sums_of_what_depends_on_each_other_stay():
    grads, weights, _ = tensors(3, 2)
    check(one_after_the_other, *grads, weights, before=3, after=3)


def test_sums_of_wide_products_stay():
    grads, weights, _ = tensors(MAX_MERGED_COLUMNS, MAX_MERGED_COLUMNS + 1, rows=2)
    check(plain_sum, *grads, weights, before=2, after=2)


def test_a_gradient_computed_from_another_is_not_merged_with_it():
    def backward(tangents, weights, x):
        later = (tangents[0] @ weights[0]).relu() @ weights[1].permute(1, 0)  # the same input again, one layer down
        return tangents[0].permute(1, 0) @ x, later.permute(1, 0) @ x, tangents[1].permute(1, 0) @ x

    check(backward, *tensors(3, 2), before=5, after=4)


def test_the_check_can_fail(monkeypatch):
    monkeypatch.setattr("cggr_compile.passes.joint.merge_products._leads_to", lambda *_: True)  # nothing may be merged
    with pytest.raises(AssertionError, match="share an input"):
        check(linear_backward, *tensors(3, 2, 2), before=6, after=2)
