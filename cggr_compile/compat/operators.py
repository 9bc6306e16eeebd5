"""What a node of a graph can call: operators, with their schemas, and higher-order operators."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

__all__ = ["CROSS_ENTROPIES", "HigherOrderOperator", "OpOverload", "OpOverloadPacket", "schema"]

# PyTorch's cross-entropy, and what a trace into it calls
CROSS_ENTROPIES = (
    torch.nn.functional.cross_entropy,
    torch._C._nn.cross_entropy_loss,
    torch.ops.aten.cross_entropy_loss,
    torch.ops.aten.cross_entropy_loss.default,
)


def schema(op: OpOverload) -> Any:
    """The operator's ``FunctionSchema``: names, defaults and aliases of its arguments, whether it writes to one."""
    return op._schema
