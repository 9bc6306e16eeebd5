"""Replaces a function of another package for the code that runs inside a ``with`` block, not for the process."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any


class ScopedPatch:
    """``with patch():`` the calls of ``module.name`` from this context become ``replacement(original, ...)``.

    While anybody is inside, the attribute is exchanged, since nothing else can intercept such a call. What stands there
    looks who calls: other threads get the original. Blocks may overlap in time and nest: the last one to end restores
    the attribute.
    """

    def __init__(self, module: ModuleType, name: str, replacement: Callable[..., Any]) -> None:
        self._module, self._name, self._replacement = module, name, replacement
        self._original: Any = None
        self._call: Any = None  # what stands in the original's place
        self._lock, self._inside = threading.Lock(), 0
        self._active: ContextVar[bool] = ContextVar(f"{module.__name__}.{name} is replaced", default=False)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if not self._inside:
                self._original = getattr(self._module, self._name)
                self._call = functools.partial(self._dispatch, self._original)
                setattr(self._module, self._name, self._call)
            self._inside += 1
        token = self._active.set(True)
        try:
            yield
        finally:
            self._active.reset(token)
            with self._lock:
                self._inside -= 1
                # what somebody else has put there since stays, and passes through us to the original
                if not self._inside and getattr(self._module, self._name) is self._call:
                    setattr(self._module, self._name, self._original)

    def _dispatch(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._active.get():
            return self._replacement(original, *args, **kwargs)
        return original(*args, **kwargs)
