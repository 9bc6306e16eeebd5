"""What a node of a graph can call: operators, with their schemas, and higher-order operators."""

from __future__ import annotations

from typing import Any

from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

__all__ = ["HigherOrderOperator", "OpOverload", "OpOverloadPacket", "schema"]


def schema(op: OpOverload) -> Any:
    """The operator's ``FunctionSchema``: names, defaults and aliases of its arguments, whether it writes to one."""
    return op._schema
