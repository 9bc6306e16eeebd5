"""Looks into a captured call of the package flash-attn: an autograd function around one of its operators."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from cggr_compile.passes.fx import argument, op_name

# known by name: the package need not be installed, nor imported before this module
_DENSE = "flash_attn._flash_attn_forward"
_PACKED = "flash_attn._flash_attn_varlen_forward"


@dataclass(frozen=True)
class FlashCall:
    """The tensors that attention reads: [B, S, heads, D], or [tokens, heads, D] where sequences are ``packed``."""

    query: Node
    key: Node
    value: Node
    packed: bool


def flash_call(node: Node) -> FlashCall | None:
    """The call of ``flash_attn_func`` or ``flash_attn_varlen_func`` at ``node``, else None."""
    if op_name(node) != "autograd_function_apply":
        return None
    body = _body(node)
    if body is None:
        return None
    inside = [n for n in body.graph.nodes if _operator(n) in (_DENSE, _PACKED)]
    if len(inside) != 1:
        return None
    inputs, operands = body.graph.find_nodes(op="placeholder"), node.args[2:]
    inputs = inputs[len(inputs) - len(operands) :]  # older releases give the context first
    given = dict(zip(inputs, operands, strict=True))
    found = [given.get(_unpadded(argument(inside[0], i, name))) for i, name in enumerate("qkv")]
    if not all(isinstance(tensor, Node) for tensor in found):
        return None
    query, key, value = found
    return FlashCall(query, key, value, _operator(inside[0]) == _PACKED)  # type: ignore[arg-type]


def _body(node: Node) -> GraphModule | None:
    held = node.args[0]
    name = str(held.target) if isinstance(held, Node) and held.op == "get_attr" else ""
    found = getattr(node.graph.owning_module, name, None)
    return found if isinstance(found, GraphModule) else None


def _operator(node: Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    return str(target) if isinstance(target, torch._ops.OpOverloadPacket) else ""


def _unpadded(tensor: Node) -> Node:
    """The package pads heads to a multiple of 8."""
    return tensor.args[0] if op_name(tensor) == "pad" else tensor  # type: ignore[return-value]
