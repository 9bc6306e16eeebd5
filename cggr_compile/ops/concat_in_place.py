"""``cggr::concat_in_place``: tensors side by side, each written where it belongs by the kernel that computes it.

``cggr::materialize`` says when that is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_compile.ops.library import define_opaque


def concat_in_place_reference(parts: list[Tensor], dim: int) -> Tensor:
    """``torch.cat`` of ``parts``, of one dtype and of one shape but for the length of axis ``dim``.

    Not ``aten.cat``: for that Inductor generates one kernel that computes, for every element, every part's expression
    and keeps one. Here every part stays a kernel of its own that writes into its place, and nothing is copied.
    """
    return torch.cat(parts, dim)


concat_in_place = define_opaque(
    "concat_in_place(Tensor[] parts, int dim) -> Tensor", concat_in_place_reference, concat_in_place_reference
)


def materialize_reference(part: Tensor) -> Tensor:
    """A copy of ``part``. For Inductor no copy: the values are computed and written here, beside what stands here.

    A part would otherwise be computed where the parts are put together, too far from the kernels that read the same
    values to be fused with them.
    """
    return part.clone()


materialize = define_opaque("materialize(Tensor part) -> Tensor", materialize_reference, torch.empty_like)
