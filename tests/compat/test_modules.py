"""Modules: compiled or not, and copies that share their state."""

from __future__ import annotations

import torch

from cggr_compile import compat


def test_compiled_modules():
    model = torch.nn.Linear(2, 2)
    compiled = torch.compile(model, backend="eager")
    assert not compat.is_compiled(model) and compat.is_compiled(compiled)
    assert compat.original_module(compiled) is model is compat.original_module(model)
    model.compile(backend="eager")
    assert compat.is_compiled(model) and compat.original_module(model) is model


def test_forward_hooks():
    model, seen = torch.nn.Linear(2, 2), []
    kept = model.register_forward_hook(lambda *_: seen.append("kept"))
    gone = lambda *_: seen.append("gone")  # noqa: E731
    model.register_forward_hook(gone, with_kwargs=True, always_call=True)
    (number,) = (number for number, hook in compat.forward_hooks(model).items() if hook is gone)
    compat.remove_forward_hook(model, number)
    model(torch.zeros(2))
    assert seen == ["kept"]
    kept.remove()
    assert not compat.forward_hooks(model)


def test_a_copy_with_another_child():
    model = torch.nn.ModuleDict({"first": torch.nn.Linear(1, 1), "second": torch.nn.Linear(1, 1)})
    model.register_buffer("seen", torch.zeros(1))
    model.compile(backend="eager")
    child = torch.nn.Identity()
    copied = compat.with_child(model, "second", child)
    assert copied["second"] is child and copied["first"] is model["first"] and copied.seen is model.seen
    assert model["second"] is not child and not compat.is_compiled(copied) and compat.is_compiled(model)
