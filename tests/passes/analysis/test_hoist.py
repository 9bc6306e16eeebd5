"""What may be computed earlier, and how: programs whose value ``w`` is wanted in front of ``x.sin()``."""

from __future__ import annotations

import pytest
import torch
from capture import Captured, execute

from cggr_compile.passes.analysis.hoist import Hoist
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.nodes import fake_value, op_name


def moved(x, p, b):
    y = x.sin()
    w = p * 2
    return (y * w).tan()


def moved_though_without_gradient(x, p, b):
    y = x.sin()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        w = (torch.arange(2) > 0).long() * 2
    return (y * w).tan()


def copied_from_no_grad(x, p, b):
    y = x.sin()
    with torch.no_grad():
        w = p * 2
    return (y * w).tan()


def copied_into_no_grad(x, p, b):
    with torch.no_grad():
        y = x.sin() * 2
    w = p * 2
    return (y * w).tan()


def copied_with_its_autocast(x, p, b):
    y = x.sin()
    with torch.autocast("cpu", torch.bfloat16):
        w = p @ p
    return (y * w).tan()


def copied_out_of_an_autocast(x, p, b):
    with torch.autocast("cpu", torch.bfloat16):
        y = x.sin() * 2
    w = p @ p
    return (y * w).tan()


def half_moved(x, p, b):
    y = x.sin()
    v = b * 3
    with torch.no_grad():
        w = p * v
    return (y * w).tan()


def written_before(x, p, b):
    b.add_(1)
    y = x.sin()
    w = p * b
    return (y * w).tan()


def written_behind_the_reader(x, p, b):
    y = x.sin()
    w = p * b.clone()
    z = (y * w).tan()
    b.add_(1)
    return z


WAYS = {
    moved: "moved",
    moved_though_without_gradient: "moved",
    copied_from_no_grad: "copied",
    copied_into_no_grad: "copied",
    copied_with_its_autocast: "copied",
    copied_out_of_an_autocast: "copied",
    half_moved: "copied",
    written_before: "moved",
    written_behind_the_reader: "moved",
}


def written(x, p, b):
    y = x.sin()
    b.add_(1)
    w = p * b
    return (y * w).tan()


def written_through_a_view(x, p, b):
    y = x.sin()
    b.view(-1)[:2].mul_(3)
    w = p * b
    return (y * w).tan()


def written_under_another_name(x, p, b):
    flat = b.view(-1)
    y = x.sin()
    b.mul_(3)
    w = p * flat.view(2, 2)
    return (y * w).tan()


def changed_between_value_and_reader(x, p, b):
    y = x.sin()
    w = p * 2
    with torch.no_grad():
        w.mul_(3)
    return (y * w).tan()


def there_already_but_written(x, p, b):
    w = p * 2
    y = x.sin()
    with torch.no_grad():
        w.mul_(3)
    return (y * w).tan()


def random(x, p, b):
    y = x.sin()
    w = p * torch.rand_like(p)
    return (y * w).tan()


def under_vmap(x, p, b):
    y = x.sin()
    w = torch.vmap(lambda row: row * 2)(p)
    return (y * w).tan()


def from_the_anchor(x, p, b):
    y = x.sin()
    w = p * y.sum()
    return (y * w).tan()


OBSTACLES = {
    written: "'add' (add_) writes in place to what w is computed from",
    written_through_a_view: "writes in place",
    written_under_another_name: "writes in place",
    changed_between_value_and_reader: "writes in place",
    there_already_but_written: "writes in place",
    random: "draws random numbers",
    under_vmap: "under torch.vmap",
    from_the_anchor: "is computed later",
}


def prepared(program):
    """The captured program, its anchor, the wanted value and what reads it."""
    args = torch.rand(2, 2), torch.rand(2, 2, requires_grad=True), torch.rand(2, 2)
    captured = Captured(program, *args)
    by_name = {op_name(node): node for node in captured.gm.graph.nodes}
    (reader,) = by_name["tan"].all_input_nodes
    wanted = reader.args[1]
    return captured, by_name["sin"], wanted, reader


@pytest.mark.parametrize("program", WAYS, ids=lambda f: f.__name__)
def test_the_same_value_earlier(program):
    captured, anchor, wanted, reader = prepared(program)
    want = captured.gm(*[x.detach().clone().requires_grad_(x.requires_grad) for x in captured.inputs])
    recorded = fake_value(wanted)
    hoist = Hoist(captured.gm.graph, anchor)
    assert hoist.obstacle(wanted, reader) == ""
    there = hoist.bring(Emitter(captured.gm.graph, captured.ctx.fake_mode), wanted, "test")
    captured.gm.graph.lint()
    order = list(captured.gm.graph.nodes)
    assert order.index(there) < order.index(anchor)
    assert (there is wanted) == (WAYS[program] == "moved")
    assert there is wanted or not fake_value(there).requires_grad
    assert fake_value(there).dtype == recorded.dtype and reader.args[1] is wanted
    # value and gradient of the program are what they were, and the value is the same at both places
    captured.gm.recompile()
    inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in captured.inputs]
    got = captured.gm(*inputs)
    assert torch.equal(got[0], want[0]) and got[0].requires_grad == want[0].requires_grad
    if there is not wanted:
        early, late = execute(captured, there, wanted)
        assert torch.equal(early, late)


@pytest.mark.parametrize("program", OBSTACLES, ids=lambda f: f.__name__)
def test_what_cannot_be_had_earlier(program):
    captured, anchor, wanted, reader = prepared(program)
    assert OBSTACLES[program] in Hoist(captured.gm.graph, anchor).obstacle(wanted, reader)


def test_what_must_not_be_computed_earlier():
    captured, anchor, wanted, reader = prepared(moved)
    assert "computed later" in Hoist(captured.gm.graph, anchor).obstacle(wanted, reader, later=[wanted])


def test_behind_an_unknown_effect():
    captured, anchor, wanted, reader = prepared(moved)
    with captured.gm.graph.inserting_before(wanted):
        captured.gm.graph.call_function(_effect)
    assert "'_effect', whose effect" in Hoist(captured.gm.graph, anchor).obstacle(wanted, reader)


def _effect() -> None:
    """Something that nobody here knows."""


def test_requires_grad_is_an_order_too():
    captured, anchor, wanted, reader = prepared(moved)
    with captured.gm.graph.inserting_before(wanted):
        begins = captured.gm.graph.call_method("requires_grad_", (wanted.args[0],))
    begins.meta["example_value"] = fake_value(begins.args[0])
    assert "requires_grad" in Hoist(captured.gm.graph, anchor).obstacle(wanted, reader)
