"""``CGGRModel``: a model that trains through the backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from cggr_compile.modules.router import TruncatedRouter
from cggr_compile.modules.settings import Arguments, Settings, takes_settings
from cggr_compile.options import OptionError, Options
from cggr_compile.registry import registry
from cggr_compile.runtime import Runtime
from cggr_compile.selections import SELECTIONS


class CGGRModel(nn.Module):
    """Wraps a language model so that training forwards go through ``backend="cggr"``; all others are the model's own.

    The model itself is not changed: ``model(...)``, ``model.generate(...)`` and its state_dict stay as they are, and
    the keys of this module's state_dict are ``step_count`` and the model's behind ``model.``. :meth:`step` follows
    ``optimizer.step()``: it advances selection and schedule, so that the micro-batches of one step share them. Loading
    a state_dict resumes at its step; what ``dynamic_threshold`` has seen is in ``runtime(model).state_dict()`` only.

    Args:
        model: what computes a loss from ``labels``.
        router: what scores the tokens: a :class:`TruncatedRouter` of this very model, of which the backend takes the
            number of blocks (it scores with the main forward's own first blocks), or None for the full model.
        **settings: scoring, selection and others: the fields of :class:`cggr_compile.modules.settings.Settings`.
        options: further options of the backend, see :class:`cggr_compile.Options`.

    Raises:
        ValueError: for an argument out of range.

    Attributes:
        step_count: int64 [], a buffer: the steps counted by :meth:`step`.
    """

    step_count: Tensor

    @takes_settings(
        *("scoring", "min_tokens_ratio", "warmup_steps", "dynamic_threshold", "threshold_sensitivity"),
        *("selection", "num_strata", "min_tokens_per_sequence"),
    )
    def __init__(
        self,
        model: nn.Module,
        router: nn.Module | None = None,
        *,
        options: Mapping[str, Any] | None = None,
        **settings: Unpack[Arguments],
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise OptionError(f"model must be a module, got {type(model).__name__}")
        self.options = _backend_options(Settings(**settings), _router_layers(model, router), options or {})
        self.model = model
        self.register_buffer("step_count", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_post_hook(_resume)
        self._compile()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """What the model returns.

        In training, with labels, its loss is over the selected tokens, and the logits are what the option ``logits``
        says. Without labels, in evaluation and without gradients this is the model's own, uncompiled forward.

        Args:
            input_ids: int64 [B, S]. labels: int64 [B, S], unshifted, -100 where there is nothing to learn.
            **kwargs: passed to the model.

        Raises:
            ValueError: for other shapes.
        """
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must have shape [B, S], got {tuple(input_ids.shape)}")
        if labels is None:
            return self.model(input_ids, **kwargs)
        if labels.shape != input_ids.shape:
            raise ValueError(f"labels must match input_ids: shape {tuple(input_ids.shape)}, got {tuple(labels.shape)}")
        if not (self.training and torch.is_grad_enabled()):
            return self.model(input_ids, labels=labels, **kwargs)
        return self._train(input_ids, labels=labels, **kwargs)

    def _compile(self) -> None:
        from cggr_compile.backend import cggr

        _resume(self)
        compiled = torch.compile(self.model, backend=cggr, options=self.options)

        def train(*args: Any, **kwargs: Any) -> Any:
            return compiled(*args, **kwargs)

        # Inlined into a user's own torch.compile, the model would lose the backend and train on every token. It is a
        # function because a compiled module would be a child of this one, with _orig_mod in the state_dict.
        reason = "CGGRModel compiles its model with the backend cggr"
        self._train: Callable[..., Any] = torch.compiler.disable(train, reason=reason)

    def step(self) -> None:
        """Count a training step; call it after ``optimizer.step()``."""
        self.step_count += 1
        self._runtime.step()

    def get_metrics(self) -> dict[str, Any]:
        """Figures of the last training forward, as :meth:`Runtime.metrics` has them: step, token_ratio,
        tokens_selected, tokens_total, avg_confidence, avg_entropy, avg_difficulty, selection, scoring and others; and
        router_tokens_selected, the same number as tokens_selected: what the router selects is what is trained on.

        The only call that waits for the device.
        """
        metrics = self._runtime.metrics()
        return {**metrics, "router_tokens_selected": metrics["tokens_selected"]}

    @property
    def _runtime(self) -> Runtime:
        return registry.of_module(self.model)

    # a copy compiles its own model
    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()
        del state["_train"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compile()


def _resume(module: CGGRModel, _: Any = None) -> None:
    """Let the backend go on at ``step_count``."""
    target, step = module._runtime, int(module.step_count)
    if target.state_dict()["step"] != step:
        target.load_state_dict({**Runtime().state_dict(), "seed": module.options["seed"], "step": step})


def _router_layers(model: nn.Module, router: nn.Module | None) -> Any:
    """The backend's option ``router_layers``."""
    if router is None:
        return "full"
    if not isinstance(router, TruncatedRouter) or router.model is not model:
        raise OptionError(
            "router must be None or a TruncatedRouter of the same model: the backend scores with the model's own "
            f"blocks; got {type(router).__name__}. CGGRScorer takes any router"
        )
    return "full" if router.passthrough else router.num_layers


def _backend_options(settings: Settings, router_layers: Any, extra: Mapping[str, Any]) -> dict[str, Any]:
    own = {**vars(settings), "router_layers": router_layers, "advance": "manual"}
    if not SELECTIONS[settings.selection].follows_confidence:
        own["dynamic_threshold"] = False
    if twice := sorted(own.keys() & extra.keys()):
        raise OptionError(f"options must leave out {twice}: they are arguments of CGGRModel, or follow from them")
    return Options.parse({**own, **extra}).as_dict()
