"""``cggr::join``: tensors side by side, each written where it belongs by the kernel that computes it.

``cggr::in_memory`` says when that is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_compile.ops.library import define_opaque


def join_reference(parts: list[Tensor], dim: int) -> Tensor:
    """``torch.cat`` of ``parts``, of one dtype and of one shape but for the length of axis ``dim``.

    Not ``aten.cat``: for that Inductor generates one kernel that computes, for every element, every part's expression
    and keeps one. Here every part stays a kernel of its own that writes into its place, and nothing is copied.
    """
    return torch.cat(parts, dim)


join = define_opaque("join(Tensor[] parts, int dim) -> Tensor", join_reference, join_reference)


def in_memory_reference(part: Tensor) -> Tensor:
    """A copy of ``part``. For Inductor no copy: the values are computed and written here, beside what stands here.

    A part of a join would otherwise be computed at the join, too far from the kernels that read the same values to be
    fused with them.
    """
    return part.clone()


in_memory = define_opaque("in_memory(Tensor part) -> Tensor", in_memory_reference, torch.empty_like)
