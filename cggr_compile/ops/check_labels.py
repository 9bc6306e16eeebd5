"""``cggr::check_labels``: raises where a label is neither a word of the vocabulary nor the ignored index."""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_compile.errors import OptionError
from cggr_compile.ops.library import define_opaque


def expected_labels(vocab: int, ignore_index: int) -> str:
    """The rule, as errors say it."""
    return f"labels must be in [0, {vocab}) or {ignore_index} (ignored)"


def check_labels_reference(target: Tensor, vocab: int, ignore_index: int) -> Tensor:
    """A copy of ``target``, int64 of any shape. Looks at its values, so it is for the CPU, where nothing has to wait.

    Raises:
        ValueError: naming the first label that is neither in [0, vocab) nor ``ignore_index``.
    """
    wrong = (target != ignore_index) & ((target < 0) | (target >= vocab))
    if bool(wrong.any()):
        raise OptionError(f"{expected_labels(vocab, ignore_index)}, got {int(target[wrong][0])}")
    return target.clone()


check_labels = define_opaque(
    "check_labels(Tensor target, int vocab, int ignore_index) -> Tensor",
    check_labels_reference,
    lambda target, vocab, ignore_index: torch.empty_like(target),
)
