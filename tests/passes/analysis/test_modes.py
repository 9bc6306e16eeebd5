from __future__ import annotations

import operator

import pytest
import torch
from capture import Captured
from torch import Tensor

from cggr_compile import compat
from cggr_compile.passes.analysis.modes import changes_modes, modes_of, remove_dead_code
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.nodes import fake_value, op_name
from cggr_compile.passes.semantic.make_sizes_static import _evaluate


def places(function, *args):
    """The captured graph's modes, by the name of the operator that runs in them."""
    captured = Captured(function, *args)
    return captured, {op_name(n): modes for n, modes in modes_of(captured.gm.graph).items() if not changes_modes(n)}


def test_regions_end_where_they_began():
    def program(x: Tensor) -> Tensor:
        x = x.sin()
        with torch.no_grad():
            x = x.cos()
            with torch.enable_grad():
                x = x.tan()
            x = x.exp()
        with torch.inference_mode():
            x = x.log()
            with torch.inference_mode(False):
                x = x.abs()
        with torch.autocast("cpu", torch.bfloat16):
            x = x.neg()
            with torch.autocast("cpu", torch.float16, enabled=False), torch.autocast("cpu"):
                x = x.ceil()
            x = x.floor()
        return x.sqrt()

    _, found = places(program, torch.ones(2, requires_grad=True))
    assert found["sin"] == found["tan"] == found["sqrt"] and found["sin"].records
    assert found["cos"] == found["exp"] and not found["cos"].records
    assert found["log"].inference and not found["log"].records
    assert found["abs"] == found["sin"]
    assert found["neg"] == found["floor"] != found["sin"]
    assert found["neg"].cast("cpu") == ("cpu", True, torch.bfloat16)
    assert found["ceil"].cast("cpu") == ("cpu", True, torch.float16)  # as plain autocast() takes the type it finds
    half = torch.ones(1, dtype=torch.float64)
    assert found["neg"].product_dtype(half) == torch.bfloat16 and found["sin"].product_dtype(half) == torch.float64
    assert found["neg"].casts_unlike(found["sin"]) == [("cpu", True, torch.bfloat16)]
    assert found["sin"].casts_unlike(found["neg"]) == [("cpu", False, torch.get_autocast_dtype("cpu"))]


def test_the_callers_modes_are_where_it_begins():
    def program(x: Tensor) -> Tensor:
        x = x.sin()
        with torch.autocast("cpu", torch.float16):
            x = x.cos()
        with torch.autocast("cpu", torch.bfloat16):
            x = x.tan()
        return x.exp()

    captured = Captured(program, torch.ones(2))
    with torch.autocast("cpu", torch.float16):
        found = {op_name(n): modes for n, modes in modes_of(captured.gm.graph).items()}
        assert found["sin"] == found["cos"] == found["exp"] != found["tan"]


def test_functions_under_vmap_are_places_of_their_own():
    def program(x: Tensor) -> Tensor:
        y = torch.vmap(lambda row: row.sin())(x)
        return torch.vmap(lambda row: row.cos())(y).tan()

    _, found = places(program, torch.ones(2, 3))
    assert len(found["sin"].levels) == len(found["cos"].levels) == 1 and found["sin"] != found["cos"]
    assert not found["tan"].levels


def change_something() -> None:
    """An effect that nobody here knows."""


def test_after_an_unknown_effect_nothing_is_as_before():
    captured = Captured(lambda x: x.sin().cos().tan(), torch.ones(2))
    graph = captured.gm.graph
    with graph.inserting_before(next(n for n in graph.nodes if op_name(n) == "cos")):
        effect = graph.call_function(change_something)
    found = {op_name(n): modes for n, modes in modes_of(graph).items()}
    assert found["sin"].unknown is None and found["cos"].unknown is found["tan"].unknown is effect


def test_checks_and_writes_are_no_unknown_effects():
    def program(x: Tensor, y: Tensor) -> Tensor:
        torch._assert_async(x.sum() > -100)
        y[0] = 1.0
        torch._foreach_add_([y], 1.0)
        with torch.autograd.graph.disable_saved_tensors_hooks("none"):
            return x.sin()

    _, found = places(program, torch.ones(2), torch.ones(2))
    assert found["sin"].unknown is None


def test_new_nodes_are_evaluated_in_the_modes_of_their_place():
    def program(x: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            y = (x @ w).sin()
        return (y.float() @ w).cos()

    captured = Captured(program, torch.ones(2, 2), torch.ones(2, 2, requires_grad=True))
    graph = captured.gm.graph
    x, w = captured.gm.graph.find_nodes(op="placeholder")
    x, w = (x, w) if fake_value(w).requires_grad else (w, x)
    emit = Emitter(graph, captured.ctx.fake_mode)
    kinds = []
    for name in ("sin", "cos"):
        with emit.before(next(n for n in graph.nodes if op_name(n) == name), "test"):
            value = fake_value(emit.call(torch.matmul, x, w))
            kinds.append((value.dtype, value.requires_grad))
    assert kinds == [(torch.bfloat16, False), (torch.float32, True)]


def test_other_modes_around_new_nodes():
    def program(x: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return (x @ w).sin().float()

    captured = Captured(program, torch.ones(2, 2), torch.ones(2, 2, requires_grad=True))
    graph = captured.gm.graph
    product, sine = (next(n for n in graph.nodes if op_name(n) == name) for name in ("matmul", "sin"))
    before = modes_of(graph)
    emit = Emitter(graph, captured.ctx.fake_mode)
    with emit.before(sine, "test"):
        with emit.under(before[next(iter(graph.nodes))]):
            outside = emit.call(torch.matmul, *product.args)
        inside = emit.call(torch.matmul, *product.args)
    assert (fake_value(outside).dtype, fake_value(outside).requires_grad) == (torch.float32, True)
    assert (fake_value(inside).dtype, fake_value(inside).requires_grad) == (torch.bfloat16, False)
    after = modes_of(graph)
    assert after[outside] == before[next(iter(graph.nodes))] and after[inside] == after[sine] == before[sine]
    graph.lint()
    graph.output_node().args = ((outside, inside, *graph.output_node().args[0]),)
    captured.gm.recompile()
    values = captured.gm(*captured.inputs)
    assert [value.dtype for value in values] == [torch.float32, torch.bfloat16, torch.float32]
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def test_inference_mode_survives_the_removal_of_dead_code():
    def program(x: Tensor) -> Tensor:
        with torch.inference_mode():
            y = x * 2
        return y.clone() + x

    captured = Captured(program, torch.ones(2, requires_grad=True))
    remove_dead_code(captured.gm.graph)
    targets = [n.target for n in captured.gm.graph.nodes]
    assert compat.ENTER_INFERENCE in targets and compat.EXIT_INFERENCE in targets


@pytest.mark.parametrize("fails", [False, True])
def test_evaluation_with_static_sizes_leaves_no_mode_behind(fails):
    def program(x: Tensor) -> Tensor:
        with torch.inference_mode():
            y = x * 2
        with torch.autograd.graph.disable_saved_tensors_hooks("none"):
            y = y + x
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            z = y @ y
        return (y.clone() * x + z).sum()

    captured = Captured(program, torch.ones(2, 2, requires_grad=True))
    gm = captured.gm
    if fails:
        product = next(n for n in gm.graph.nodes if op_name(n) == "matmul")
        product.target = operator.getitem  # of a float tensor with another: an error
        with pytest.raises(Exception):  # noqa: B017  (whatever torch raises)
            _evaluate(gm, captured.inputs, compat.static_fake_mode())
    else:
        values = _evaluate(gm, captured.inputs, compat.static_fake_mode())
        for node, value in values.items():
            if isinstance(value, Tensor):
                old = fake_value(node)
                assert (value.dtype, value.requires_grad) == (old.dtype, old.requires_grad), node
                assert not value.is_inference()
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert not torch.is_autocast_enabled("cpu")
    with torch.autograd.graph.save_on_cpu():  # not refused
        (torch.ones(2, requires_grad=True) ** 2).sum().backward()
