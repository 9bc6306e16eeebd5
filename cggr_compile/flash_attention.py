"""Chooses the attention implementation of a transformers model: flash_attention_2, sdpa or eager."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

log = logging.getLogger(__name__)
# in order of preference
BACKENDS = ("flash_attention_2", "sdpa", "eager")


def load_model_with_flash_attention(name_or_path: str, backend: str = "auto", **kwargs: Any) -> nn.Module:
    """``transformers.AutoModelForCausalLM.from_pretrained`` with the best attention that works here.

    Args:
        name_or_path: of the checkpoint.
        backend: see :func:`enable_flash_attention`.
        **kwargs: passed to ``from_pretrained`` (``dtype``, ``device_map``, ...).

    Returns:
        the model, on the CPU unless ``device_map`` says otherwise. What ``auto`` takes suits the device that it is on:
        call :func:`enable_flash_attention` again after moving it.

    Raises:
        ImportError: without transformers. ValueError: as :func:`enable_flash_attention`.
    """
    from transformers import AutoModelForCausalLM

    _check_name(backend)
    if "attn_implementation" in kwargs:
        raise ValueError("attn_implementation must be left out: backend chooses it")
    model: Any = AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)
    return enable_flash_attention(model, backend)


def enable_flash_attention(model: nn.Module, backend: str = "auto") -> nn.Module:
    """Sets how a transformers model computes attention; a line in the log says what was taken and why not another.

    Nothing outside the model is touched, nor are its parameters. FlashAttention-2 is arXiv 2307.08691; PyTorch's
    own kernels (``sdpa``) include it on CUDA.

    Args:
        model: a ``transformers.PreTrainedModel``.
        backend: ``flash_attention_2`` (needs the package flash-attn, a CUDA device and 16-bit parameters), ``sdpa``,
            ``eager``, or ``auto``: the first of these that the model, its device and its dtype allow.

    Returns:
        the model itself.

    Raises:
        ValueError: for another ``backend``, one that cannot work here (with the reason), or a model that has no choice.
    """
    _check_name(backend)
    choose: Any = getattr(model, "set_attn_implementation", None)
    if choose is None:
        raise ValueError(f"model must be a transformers model, got {type(model).__name__}")
    refused: dict[str, str] = {}
    for candidate in BACKENDS if backend == "auto" else (backend,):
        why = _obstacle(model, candidate)
        if not why:
            choose(candidate)
            notes = "".join(f"; not {name}: {reason}" for name, reason in refused.items())
            log.warning("attention: %s%s", candidate, notes)
            return model
        refused[candidate] = why
    raise ValueError(f"backend must be one that works here: {backend!r} does not, {refused[backend]}")


def _check_name(backend: str) -> None:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of {['auto', *BACKENDS]}, got {backend!r}")


def _obstacle(model: Any, backend: str) -> str:
    """Why a model cannot use an implementation; empty if it can."""
    name = type(model).__name__
    if backend == "sdpa":
        return "" if getattr(model, "_supports_sdpa", False) else f"{name} does not support it"
    if backend == "eager":
        return ""
    from transformers.utils import is_flash_attn_2_available

    if not any(getattr(model, flag, False) for flag in ("_supports_flash_attn", "_supports_flash_attn_2")):
        return f"{name} does not support it"
    first = next(model.parameters())
    if first.device.type != "cuda":
        return f"it needs a CUDA device, the model is on {first.device.type}"
    if first.dtype not in (torch.float16, torch.bfloat16):
        return f"it needs float16 or bfloat16, the model is in {first.dtype}"
    return "" if is_flash_attn_2_available() else "the package flash-attn is not installed"
