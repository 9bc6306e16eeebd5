"""A module compiled in place for its training forwards alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import Module

from cggr_compile import compat
from cggr_compile.backend import cggr


class TrainingCall:
    """Runs in place of ``module(...)``: compiled in a training forward, as it is in any other.

    A trainer evaluates and generates with the model that it trains. Compiled, that would take a graph for every length
    of a prompt, and Dynamo gives a model up after a few graphs. What trains has the module in training mode and
    gradients on.

    Args:
        options: of the backend.
        dynamic: as ``torch.compile``'s; False makes a graph for every size.
        before: called before every training forward.
    """

    def __init__(
        self,
        module: Module,
        options: Mapping[str, Any],
        *,
        dynamic: bool | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.module = module
        self._plain = compat.plain_call(module)
        self._compiled = torch.compile(self._plain, backend=cggr, options=dict(options), dynamic=dynamic)
        self._before = before

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.module.training and torch.is_grad_enabled()):
            return self._plain(*args, **kwargs)
        self._before()
        return self._compiled(*args, **kwargs)


def compiled_part(module: Module) -> Module | None:
    """The first module, among this one and those inside of it, that something else than this file has compiled."""
    for part in module.modules():
        if compat.is_compiled(part) and not isinstance(compat.compiled_call(part), TrainingCall):
            return part
    return None
