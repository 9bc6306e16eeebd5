"""In which models transformers' hooks are installed before a capture. End to end: the router logits of the experts."""

from __future__ import annotations

from collections.abc import Callable
from inspect import unwrap
from typing import Any

import models
import pytest
import torch
from torch import nn

from cggr_compile import output_hooks
from cggr_compile.output_hooks import install, watch

MIXTRAL = dict(num_hidden_layers=1)
IDS = torch.zeros(1, 4, dtype=torch.long)


def mixtral(**config: Any) -> nn.Module:
    return models.family("mixtral", **MIXTRAL, **config)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def forward(model: nn.Module) -> Callable[..., Any]:
    return lambda ids: model(ids, output_router_logits=True)


def as_it_is(gm: torch.fx.GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
    return gm.forward


@pytest.mark.parametrize(
    ("scope", "named", "config"),
    [
        ({"kwargs": {"output_router_logits": True}}, (), {}),  # def wrapper(self, *args, **kwargs)
        ({"output_router_logits": True}, (), {}),  # def forward(self, input_ids, output_router_logits=None)
        ({"kwargs": {}}, ("output_router_logits",), {}),  # def step(ids): return model(ids, output_router_logits=True)
        ({}, (), {"output_router_logits": True}),
        ({"batch": {"output_hidden_states": [0, -1]}}, (), {}),
    ],
)
def test_a_model_that_is_asked_gets_them_once(scope: dict[str, Any], named: tuple[str, ...], config: Any) -> None:
    model = mixtral(**config)
    assert install({"args": (nn.Sequential(model),), **scope}, frozenset(named)) == [model]
    count = hooks(model)
    assert count and install({"self": model, **scope}, frozenset(named)) == []
    out = model(IDS, output_router_logits=True, output_hidden_states=True)  # transformers finds what it looks for
    assert hooks(model) == count and len(out.router_logits) == 1 and len(out.hidden_states) == 2


@pytest.mark.parametrize(
    "scope",
    [
        {"kwargs": {"output_router_logits": False}, "output_attentions": None},
        {"kwargs": {"output_logits": True}},  # nothing that it records
        {"model": nn.Linear(2, 2), "output_router_logits": True},
    ],
)
def test_others_are_left_alone(scope: dict[str, Any]) -> None:
    model = mixtral()
    assert install({"self": model, **scope} if "model" not in scope else scope) == [] and not hooks(model)


def test_a_module_under_construction_is_left_alone() -> None:
    module = nn.Module.__new__(nn.Module)
    assert install({"self": module, "output_router_logits": True}) == []


def test_a_model_whose_inner_one_has_them_is_left_alone() -> None:
    model = mixtral()
    model.model(IDS, output_router_logits=True)
    count = hooks(model)
    assert install({"self": model, "output_router_logits": True}) == [] and hooks(model) == count


def test_code_of_transformers_asks_for_nothing() -> None:
    """It names every output, in its calls of the inner model."""
    watch(as_it_is)
    model = mixtral()
    function = unwrap(type(model).forward)
    assert "output_router_logits" in str(function.__code__.co_consts)
    torch.compile(lambda ids: ids, backend=as_it_is)(IDS)
    torch.compile(function, backend=as_it_is)(model, IDS)
    assert not hooks(model)


def test_what_another_backend_compiles_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(output_hooks, "install", lambda scope, _named: asked.append(scope))
    watch(as_it_is)
    for backend, count in (("eager", 0), (as_it_is, 1)):
        torch.compile(lambda ids: ids + 1, backend=backend)(IDS)
        assert len(asked) == count


@pytest.mark.parametrize("how", ["method", "function"])
def test_before_the_first_capture(how: str) -> None:
    """One graph: it is captured by a backend that knows nothing of this package."""
    model, graphs = mixtral(), []
    asked: Any = {"output_router_logits": True} if how == "method" else {}

    def keep(gm: torch.fx.GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    watch(keep)
    run = torch.compile(model if how == "method" else forward(model), backend=keep, fullgraph=True)
    assert len(run(IDS, **asked).router_logits) == 1 and len(graphs) == 1
