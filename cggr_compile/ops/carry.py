"""``cggr::carry``: keeps a tensor that the model itself does not read in the captured graph."""

from __future__ import annotations

from torch import Tensor

from cggr_compile.ops.library import define_composite


def carry_reference(labels: Tensor, cargo: Tensor) -> Tensor:
    """A copy of ``labels``. Dynamo drops inputs that nothing uses; ``cargo`` (any tensor) is used here."""
    return labels.clone()


carry = define_composite("carry(Tensor labels, Tensor cargo) -> Tensor", carry_reference)
