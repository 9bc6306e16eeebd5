from __future__ import annotations

import operator

import models
import pytest
import torch
import torch.nn.functional as F
from capture import Captured

from cggr_compile.passes.analysis.effects import mutated_operand
from cggr_compile.passes.nodes import op_name
from cggr_compile.passes.semantic.functionalize import Functionalize


def run(function, *args):
    captured = Captured(function, *args)
    result = Functionalize()(captured.gm, captured.ctx)
    captured.gm.graph.lint()
    captured.gm.recompile()
    left = [op_name(n) for n in captured.gm.graph.nodes if mutated_operand(n) is not None]
    return captured, result, left


def augmented(x, w):
    h = x @ w
    h += x
    h *= 2
    return h.relu()


def method(x, w):
    h = x @ w
    h.add_(x).mul_(2)
    return h.relu()


def function(x, w):
    return F.relu_(x @ w) + F.relu(x @ w, inplace=True) + F.dropout(x @ w, 0.0, True, True)


@pytest.mark.parametrize("program", [augmented, method, function])
def test_replaced_exactly(program):
    x, w = torch.randn(3, 4), torch.randn(4, 4, requires_grad=True)
    captured, result, left = run(program, x, w)
    assert result.matched and not left
    captured.check_shapes()
    order = {id(value): value for value in (x, w)}
    outputs = captured.gm(*[order.get(id(v), v) for v in captured.inputs])
    torch.testing.assert_close(outputs[0], program(x, w))
    assert not Functionalize()(captured.gm, captured.ctx).matched  # idempotent


def through_a_view(x, w):
    h = x @ w
    h[:, :2].mul_(3)
    return h + 1


def into_a_part(x, w):
    h = x @ w
    h[0] = 0.0
    return h + 1


def old_name_is_read(x, w):
    h = x @ w
    flat = h.view(-1)
    h += 1
    return flat.sum()


def casts(x, w):
    h = (x @ w).bfloat16()
    h += x
    return h


def under_no_grad(x, w):
    """The gradient of ``h`` is that of the product, whatever is written to it."""
    h = x @ w
    with torch.no_grad():
        h.mul_(3)
    return h + 1


def the_callers(x, w):
    x += 1
    return x @ w


@pytest.mark.parametrize("program", [through_a_view, into_a_part, old_name_is_read, casts, under_no_grad, the_callers])
def test_left_alone(program):
    _, result, left = run(program, torch.randn(3, 4), torch.randn(4, 4, requires_grad=True))
    assert not result.matched and len(left) == 1


def test_requires_grad_is_no_write():
    def program(x):
        return (x * 2).detach().requires_grad_() * 3

    assert run(program, torch.ones(2))[2] == []


def test_writes_into_the_stream_are_refused(batch):
    decoder = models.Decoder()

    def hook(module, args, output):
        output = output.clone()
        output[:, 0] = 0.0
        return output

    decoder.blocks[3].register_forward_hook(hook)
    captured = Captured(lambda i: F.cross_entropy(decoder(i).flatten(0, 1), i.flatten()), batch["input_ids"])
    result = captured.run("find_stack")
    assert not result.matched and "setitem" in result.reason


def test_labels_written_before_and_after(batch):
    decoder = models.Decoder()

    def before(ids):
        labels = ids.clone()
        labels[:, :3] = -100
        return F.cross_entropy(decoder(ids).flatten(0, 1), labels.flatten())

    def after(ids):
        labels = ids.clone()
        logits = decoder(ids)
        labels[:, :3] = -100
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    assert Captured(before, batch["input_ids"]).run("align_targets").matched
    torch._dynamo.reset()
    result = Captured(after, batch["input_ids"]).run("align_targets")
    assert not result.matched and "setitem" in result.reason


def test_operators():
    assert op_name(torch.fx.Graph().call_function(operator.iadd)) == "add"


def filled(first, second, between=lambda a: None, then=lambda k, a, b: None):
    def program(x, w):
        a, b = x @ w, x.sin().double()
        k = a.new_empty(3, 8)
        k[first].copy_(a)
        between(a)
        k[second].copy_(b)
        then(k, a, b)
        return k.relu() * 2

    return program


LEFT, RIGHT = (..., slice(None, 4)), (..., slice(4, None))


def half_without_gradient(x, w):
    a, b = x @ w, x @ w.sin()
    k = a.new_empty(3, 8)
    with torch.no_grad():
        k[..., :4].copy_(a)
    k[..., 4:].copy_(b)
    return k.relu() * 2


@pytest.mark.parametrize(
    "program",
    [
        filled(LEFT, RIGHT),
        filled(RIGHT, LEFT),
        filled((slice(None), slice(0, 4)), RIGHT),
        filled(LEFT, RIGHT, then=lambda k, a, b: k.mul_(2)),
    ],
)
def test_filled_by_parts(program):
    x, w = torch.randn(3, 4), torch.randn(4, 4, requires_grad=True)
    captured, result, left = run(program, x, w)
    assert result.matched and not left and captured.operators()["cat"] == 1
    captured.check_shapes()
    outputs = captured.gm(*[{id(x): x, id(w): w}.get(id(v), v) for v in captured.inputs])
    torch.testing.assert_close(outputs[0], program(x, w))


@pytest.mark.parametrize(
    "program",
    [
        filled((..., slice(0, 4)), (..., slice(3, 7))),  # overlap
        filled(LEFT, LEFT),  # the rest stays unset
        filled(LEFT, RIGHT, then=lambda k, a, b: k[..., 2:3].copy_(a[:, :1])),
        filled(LEFT, RIGHT, between=lambda a: a.mul_(2)),
        half_without_gradient,
    ],
)
def test_otherwise_filled_is_no_concatenation(program):
    captured, _, left = run(program, torch.randn(3, 4), torch.randn(4, 4, requires_grad=True))
    assert "copy" in left and not captured.operators()["cat"]


def by_chunks(x, w):
    """A recurrence that writes what it computes of each position into its place."""
    y, state = torch.zeros(3, 4, 4), x @ w
    for i in range(4):
        state = state.tanh()
        y[:, i] = state
    return y.relu()


def nested(x, w):
    y = (x @ w).new_zeros(2, 3, 8)
    y[1, :, -2] = (x @ w)[:, 0]
    return y * 2


@pytest.mark.parametrize("program", [by_chunks, nested])
def test_assigned_parts(program):
    x, w = torch.randn(3, 4), torch.randn(4, 4, requires_grad=True)
    captured, result, left = run(program, x, w)
    assert result.matched and not left
    captured.check_shapes()
    (output,) = captured.gm(*[{id(x): x, id(w): w}.get(id(v), v) for v in captured.inputs])
    (want,) = torch.autograd.grad(program(x, w).square().sum(), w)
    torch.testing.assert_close(output, program(x, w))
    torch.testing.assert_close(torch.autograd.grad(output.square().sum(), w)[0], want)


def read_by_another_name(x, w):
    y = torch.zeros(3, 4)
    first = y[0]
    y[0] = (x @ w)[0]
    return first.sum()


def assigned_under_no_grad(x, w):
    y = x @ w
    with torch.no_grad():
        y[0] = y[1].sin()
    return y + 1


def spread_out(x, w):
    y = torch.zeros(3, 4)
    y[0] = (x @ w)[0, :1]
    y[1:] = x[1:] @ w
    return y


@pytest.mark.parametrize("program", [read_by_another_name, assigned_under_no_grad, spread_out])
def test_parts_that_stay_assigned(program):
    _, _, left = run(program, torch.randn(3, 4), torch.randn(4, 4, requires_grad=True))
    assert "setitem" in left
