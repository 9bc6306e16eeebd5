"""PyTorch's structured trace log."""

from __future__ import annotations


def trace_structured(name: str, text: str) -> None:
    """Hand an artifact to the structured trace log (tlparse)."""
    from torch._logging import trace_structured as emit

    emit("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=lambda: text)
