"""Names the loss of a transformers model that has no ``loss_type``, which transformers only takes with a warning."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from torch.nn import Module

from cggr_compile import compat

log = logging.getLogger(__name__)
DEFAULT = "ForCausalLM"


def name_default_loss(end: compat.GraphBreak | None, modules: Iterable[Module]) -> bool:
    """Give the models among ``modules`` the loss that they take by default, if its warning ends the graph.

    A transformers model whose class is named otherwise than ``...ForCausalLM`` (GPT-2, BERT) has the ``loss_type``
    None. Its first forward with labels warns that it takes the default, and the warning breaks the graph between head
    and loss. With the name of the same loss there is no warning.

    Args:
        end: the break that ends the graph under capture; None: it goes to the end of the captured function.

    Returns:
        Whether some model has been given one, so that another capture finds no such break.
    """
    if end is None or not _takes_loss(end):
        return False
    unnamed = {part: None for module in modules for part in module.modules() if _takes_default(part)}
    for model in unnamed:
        model.loss_type = DEFAULT  # type: ignore[assignment]
        log.info("%s has no loss_type: it is set to %r, which it takes by default", type(model).__name__, DEFAULT)
    return bool(unnamed)


def _takes_loss(end: compat.GraphBreak) -> bool:
    """Whether the graph ends in transformers' ``loss_function``, or where ``self.loss_function(...)`` asks for it.

    Of a call that Dynamo cannot go on behind it does not tell what is inside.
    """
    frames = [frame for frame in end.stack if "transformers" in Path(frame.filename).parts]
    last = frames[-1].line if frames and frames[-1] is end.stack[-1] else None
    return any(frame.name == "loss_function" for frame in frames) or "self.loss_function" in (last or "")


def _takes_default(module: Module) -> bool:
    chosen = getattr(type(module), "loss_function", None)
    ours = (
        isinstance(chosen, property) and chosen.fget is not None and chosen.fget.__module__.startswith("transformers.")
    )
    return ours and getattr(module, "loss_type", "") is None
