"""Who runs a compiled graph."""

from __future__ import annotations

import torch

from cggr_compile import compat


def test_callers():
    """Read off the stack: what torch.compile was given, and the captured frame with its variables."""
    found = []

    def read(gm, inputs):
        code = compat.captured_code()
        assert code is not None and compat.caller(code).captured is None

        def run(*args):
            found.append((compat.caller(code).module, compat.caller(code).scopes))
            return gm.forward(*args)

        return run

    class Model(torch.nn.Module):
        def forward(self, x):
            return x * 2

    model, x = Model(), torch.ones(2)
    torch.compile(model, backend=read)(x)
    torch.compile(model.forward, backend=read)(x)
    torch.compile(torch.nn.ReLU(), backend=read)(x)  # Dynamo wraps what is PyTorch's own
    torch.compile(lambda model, x: model(x), backend=read)(model, x)
    modules = [module for module, _ in found]
    assert modules[:2] == [model, model] and type(modules[2]) is torch.nn.ReLU and modules[3] is None
    assert [scopes["L"].get("self") for _, scopes in found[:2]] == [model, model]
    assert found[3][1]["L"]["model"] is model and found[3][1]["G"]["compat"] is compat
    assert compat.caller(None) == compat.Caller(None, None) and compat.captured_code() is None
