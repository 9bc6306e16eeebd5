"""PyTorch's structured trace log."""

from __future__ import annotations

from collections.abc import Callable


def trace_structured(name: str, text: Callable[[], str]) -> None:
    """Hand an artifact to the structured trace log (tlparse). ``text`` is called if there is such a log."""
    from torch._logging import trace_structured as emit

    emit("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text)
