"""``explain``: one call of a model under the backend, and what became of its graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch

from cggr_compile import compat
from cggr_compile.options import Options
from cggr_compile.registry import registry
from cggr_compile.report import Explanation


def explain(model: torch.nn.Module, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Explanation:
    """Say what the backend does with ``model(*args, **kwargs)``: what matched, what was rewritten, why not.

    A model that is compiled with ``backend="cggr"`` is called as it is (compiling it now, if this is its first
    call with such inputs). Any other model is compiled aside, with ``options`` and without code generation, and
    stays as it was. Either way the step, the selection and torch's random state are left as they were.

    Args:
        model: a module, compiled or not, in the mode (train or eval) to explain.
        options: for a model that is not compiled yet.

    Returns:
        an :class:`Explanation`; ``print`` it, or read ``.matched``, ``.reason``, ``.passes``, ``.save(folder)``.

    Raises:
        ValueError: for unusable options.
    """
    settings = Options.parse(options)
    target = compat.original_module(model)
    with ExitStack() as stack:
        call: Callable[..., Any] = model
        if compat.is_compiled(model):
            own = registry.of_module(target)
        else:
            # a compile of its own, so that nothing stays behind on the model
            from cggr_compile.backend import cggr

            own = stack.enter_context(registry.replaced(target))
            aside = {**settings.as_dict(), "compiler": "eager", "fallback": "silent"}
            call = torch.compile(model.forward, backend=cggr, options=aside)
        # parts that are compiled by themselves and not traced into
        runtimes = dict.fromkeys((own, *registry.inside(target)))
        seen = [stack.enter_context(one.observed()) for one in runtimes]
        stack.enter_context(torch.random.fork_rng())
        call(*args, **kwargs)
    return Explanation([report for reports in seen for report in reports])
