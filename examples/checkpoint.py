"""A file from which a training run goes on as if it had not stopped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def save(path: Path, parts: Mapping[str, Any], settings: Mapping[str, str]) -> None:
    """Store the states of ``parts`` and of the random generators; ``path`` is replaced at once, never half written."""
    states = {name: part.state_dict() for name, part in parts.items()}
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    draft = path.with_suffix(".draft")
    torch.save({"settings": dict(settings), "parts": states, "random": random}, draft)
    draft.replace(path)


def load(path: Path, parts: Mapping[str, Any], settings: Mapping[str, str]) -> None:
    """Give ``parts`` and the random generators the states that :func:`save` stored.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is of a run with other ``settings``; it names them.
    """
    stored = torch.load(path, map_location="cpu", weights_only=True)
    before = stored["settings"]
    other = [
        f"{name}={before.get(name)} then, {name}={settings.get(name)} now"
        for name in sorted({*before, *settings})
        if before.get(name) != settings.get(name)
    ]
    if other:
        raise ValueError(f"{path} is of a run with other settings: {'; '.join(other)}")
    for name, part in parts.items():
        part.load_state_dict(stored["parts"][name])
    torch.set_rng_state(stored["random"]["cpu"])
    if torch.cuda.is_available() and "cuda" in stored["random"]:
        torch.cuda.set_rng_state(stored["random"]["cuda"])
