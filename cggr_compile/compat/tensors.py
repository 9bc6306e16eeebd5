"""Tensors by identity: the memory behind them, and mappings that do not keep them alive."""

from __future__ import annotations

from typing import Any

import torch


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of the whole batch behind what a function under ``torch.vmap`` sees."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def storage_id(tensor: torch.Tensor) -> int:
    """The same number for tensors (fake ones too) that share memory.

    Raises:
        NotImplementedError, RuntimeError: a wrapper subclass, which has no memory of its own.
    """
    return int(unwrapped(tensor).untyped_storage()._cdata)


def weak_tensor_dict() -> Any:
    """A mapping from tensors (by identity) that does not keep them alive."""
    from torch.utils.weak import WeakTensorKeyDictionary

    return WeakTensorKeyDictionary()


def weak_identity_dict() -> Any:
    """A mapping from objects, by identity whatever they define as equal, that does not keep them alive."""
    from torch.utils.weak import WeakIdKeyDictionary

    return WeakIdKeyDictionary()
