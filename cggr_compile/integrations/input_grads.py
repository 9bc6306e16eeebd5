"""Takes off the hook of transformers' ``enable_input_require_grads``, which breaks the graph behind the embedding."""

from __future__ import annotations

import logging
from typing import Any

from torch.nn import Module

from cggr_compile import compat

log = logging.getLogger(__name__)


class InputGradsHooks:
    """Called before every training forward of ``model``: the hook comes back whenever checkpointing is switched on.

    The hook makes the embedding's output require gradient, so that reentrant checkpoints keep the gradient of what is
    trained inside of them. Others do not need it. With reentrant ones it stays, and the graph stays dense.

    transformers loses sight of a hook where checkpointing is switched on again, as TRL does behind every generation.
    Each is one more that Dynamo sees, and compiles again for; all are taken off.
    """

    def __init__(self, model: Module) -> None:
        # PreTrainedModel, which has the hooks, may be inside of a wrapper
        self._models: list[Any] = [m for m in model.modules() if hasattr(m, "disable_input_require_grads")]
        self._layers: list[Any] = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self._told = False

    def __call__(self) -> None:
        found = [
            (part, number) for part in map(_embedding, self._models) if part is not None for number in _hooks(part)
        ]
        if not found or any(map(_reentrant, self._layers)):
            return
        for model in self._models:
            model.disable_input_require_grads()  # which forgets those that it knows
        for part, number in found:
            compat.remove_forward_hook(part, number)
        if not self._told:
            self._told = True
            log.warning(
                "the hook of enable_input_require_grads() is taken off: it breaks the graph, and checkpoints with "
                "use_reentrant=False do not need it"
            )


def _embedding(model: Any) -> Module | None:
    try:
        found = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return found if isinstance(found, Module) else None


def _hooks(embedding: Module) -> list[int]:
    hooks = compat.forward_hooks(embedding).items()
    return [number for number, hook in hooks if "enable_input_require_grads." in getattr(hook, "__qualname__", "")]


def _reentrant(layer: Any) -> bool:
    function = getattr(layer, "_gradient_checkpointing_func", None)
    return bool(layer.gradient_checkpointing and getattr(function, "keywords", {}).get("use_reentrant", True))
