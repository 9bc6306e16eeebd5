"""``train_step``: a decorator for the function that makes one training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast, overload

import torch

from cggr_compile.options import Options

F = TypeVar("F", bound=Callable[..., Any])


@overload
def train_step(function: F, /) -> F: ...
@overload
def train_step(*, mode: str | None = None, **options: Any) -> Callable[[F], F]: ...
def train_step(function: Any = None, /, *, mode: str | None = None, **options: Any) -> Any:
    """Compile a training step with ``backend="cggr"``.

    The function calls a model and computes a loss; it may return the loss, or call ``loss.backward()`` and
    ``optimizer.step()`` itself (torch then compiles those parts as graphs of their own)::

        @cggr_compile.train_step(min_tokens_ratio=0.25)
        def step(model, batch):
            return model(**batch).loss

    Args:
        mode: as ``torch.compile``'s.
        **options: see :class:`cggr_compile.Options`.

    Raises:
        ValueError: at decoration, for unusable options.
    """
    if function is not None:
        return train_step()(function)
    Options.parse(options)

    def decorate(step: F) -> F:
        from cggr_compile.backend import cggr

        extra: dict[str, Any] = {"mode": mode} if mode else {}
        return cast(F, torch.compile(step, backend=cggr, options=options, **extra))

    return decorate
