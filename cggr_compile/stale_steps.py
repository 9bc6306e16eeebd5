"""Counts the training steps that ran without the backend, once Dynamo has given up on a model's code."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


class StaleSteps:
    """Optimizer steps of a model since a training forward of it was seen; that forward's own step is not counted.

    Nothing is counted, and no hook installed, before :meth:`begin`. Two optimizers of one model count once. Nothing
    waits for the device.
    """

    def __init__(self) -> None:
        self.count = 0
        self._own = False  # whether the step of the forward that was seen is still to come
        self._parameters: list[weakref.ref[Tensor]] = []
        self._optimizer: weakref.ref[Optimizer] | None = None
        self._hook: Any = None

    def begin(self, parameters: Iterable[Tensor]) -> None:
        """From now on training forwards may run unseen; ``parameters``: of the model, as the optimizer has them."""
        parameters = list(parameters)
        self._parameters = [weakref.ref(p) for p in parameters]
        if self._hook is None:
            self._own = any(p.grad is not None for p in parameters)
            this = weakref.ref(self)

            def after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
                if (counter := this()) is not None:
                    counter._stepped(optimizer)

            self._hook = register_optimizer_step_post_hook(after_step)
            weakref.finalize(self, self._hook.remove)

    def end(self) -> None:
        """Every training forward is seen again."""
        self.count = 0
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def seen(self) -> None:
        """A training forward is under way."""
        self.count, self._own = 0, True

    def _stepped(self, optimizer: Optimizer) -> None:
        known = None if self._optimizer is None else self._optimizer()
        if known is None and self._has_ours(optimizer):
            known, self._optimizer = optimizer, weakref.ref(optimizer)
        if known is optimizer:
            self.count += not self._own
            self._own = False

    def _has_ours(self, optimizer: Optimizer) -> bool:
        ours = {id(p) for ref in self._parameters if (p := ref()) is not None}
        return any(id(p) in ours for group in optimizer.param_groups for p in group["params"])
