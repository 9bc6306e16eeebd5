"""Models and tokenizers that the command line names. Nothing is downloaded."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch


def load_model(source: str, *, trained: bool = False) -> tuple[torch.nn.Module, int]:
    """A model and its vocabulary size.

    Args:
        source: a transformers config folder or config.json, or ``package.module:function``, which returns the model.
        trained: read the weights that are in the folder; else, and where there are none, they are random.

    Raises:
        ValueError: there is no such model.
    """
    if ":" in source and not Path(source).exists():
        module, _, name = source.partition(":")
        try:
            model = getattr(importlib.import_module(module), name)()
        except (ImportError, AttributeError) as error:
            raise ValueError(f"model: cannot import {source!r}: {error}") from error
    else:
        path = Path(source)
        if not path.exists():
            raise ValueError(f"model must be a config folder, a config.json or module:function; no such file: {source}")
        model = _from_folder(path, trained and has_weights(source))
    embedding = next((m for m in model.modules() if isinstance(m, torch.nn.Embedding)), None)
    if embedding is None:
        raise ValueError(f"model: {source!r} has no token embedding")
    return model, embedding.num_embeddings


def has_weights(source: str) -> bool:
    """Whether a folder holds weights that transformers reads."""
    return Path(source).is_dir() and any(Path(source).glob("*.safetensors"))


def load_tokenizer(source: str) -> Any:
    """The tokenizer in a model's folder; None if there is none."""
    folder = Path(source)
    if not folder.is_dir() or not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: cannot read the tokenizer in {source}: {error}") from error


def _from_folder(path: Path, trained: bool) -> Any:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ValueError("model: a transformers config needs transformers (pip install transformers)") from error
    try:
        if trained:
            return AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ValueError(f"model: transformers cannot read {path}: {error}") from error
