"""Takes off the hook of transformers' ``enable_input_require_grads``, which breaks the graph behind the embedding."""

from __future__ import annotations

import logging
from typing import Any

from torch.nn import Module

log = logging.getLogger(__name__)


class InputGradsHooks:
    """Called before every training forward of ``model``: the hook comes back whenever checkpointing is switched on.

    The hook makes the embedding's output require gradient, so that reentrant checkpoints keep the gradient of what is
    trained inside of them. Others do not need it. With reentrant ones it stays, and the graph stays dense.
    """

    def __init__(self, model: Module) -> None:
        # PreTrainedModel, which has the hooks, may be inside of a wrapper
        self._models: list[Any] = [m for m in model.modules() if hasattr(m, "disable_input_require_grads")]
        self._layers: list[Any] = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self._told = False

    def __call__(self) -> None:
        hooked = [m for m in self._models if getattr(m, "_require_grads_hooks", None)]
        if not hooked or any(map(_reentrant, self._layers)):
            return
        for model in hooked:
            model.disable_input_require_grads()
        if not self._told:
            self._told = True
            log.warning(
                "the hook of enable_input_require_grads() is taken off: it breaks the graph, and checkpoints with "
                "use_reentrant=False do not need it"
            )


def _reentrant(layer: Any) -> bool:
    function = getattr(layer, "_gradient_checkpointing_func", None)
    return bool(layer.gradient_checkpointing and getattr(function, "keywords", {}).get("use_reentrant", True))
