"""``cggr::join_columns``: matrices side by side, each written where it belongs by the kernel that computes it."""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_compile.ops.library import define_opaque


def join_columns_reference(parts: list[Tensor]) -> Tensor:
    """``parts`` [R, N_i] of one dtype -> [R, sum of N_i].

    Not ``aten.cat``: for that Inductor generates one kernel that computes, for every element, every part's expression
    and keeps one. Here every part stays a kernel of its own that writes into its columns, and nothing is copied.
    """
    return torch.cat(parts, 1)


join_columns = define_opaque("join_columns(Tensor[] parts) -> Tensor", join_columns_reference, join_columns_reference)
