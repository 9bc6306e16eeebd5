"""``F.multi_head_attention_forward``, which is what ``nn.MultiheadAttention`` is in Dynamo's graph."""

from __future__ import annotations

import inspect
import operator
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch.fx import Node

from cggr_compile.passes.nodes import argument, op_name, shape_of

NAME = "multi_head_attention_forward"
_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


@dataclass(frozen=True)
class MultiHeadCall:
    """Self-attention of one tensor, without weights as a result.

    Attributes:
        source: [B, S, H]; the call itself gets it as [S, B, H].
        mask: bool, True hides, or float, is added; None: all is seen, or what ``is_causal`` leaves.
        dropout: its probability, 0.0 outside of training.
        result: the attention's output [S, B, H] among what the call returns.
        swaps: the calls that put the positions in front, and the sequences back.
    """

    source: Node
    heads: int
    in_weight: Node  # [3 H, H]
    in_bias: Node | None
    out_weight: Node
    out_bias: Node | None
    mask: Node | None
    is_causal: bool
    dropout: float
    result: Node
    swaps: tuple[Node, ...]


def read_call(node: Node) -> MultiHeadCall | str:
    """What a call computes, or why it cannot be written as its parts."""
    given = _SIGNATURE.bind(*node.args, **node.kwargs)
    given.apply_defaults()
    call: dict[str, Any] = given.arguments
    why = _obstacle(call)
    if why is not None:
        return why
    if len(node.users) != 1 or any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        return "something else than its output is read"
    source = call["query"]
    if not is_swap(source):
        return "its input is [sequence, batch, hidden] (batch_first=False)"
    (result,) = node.users
    causal = bool(call["is_causal"]) and call["attn_mask"] is not None
    return MultiHeadCall(
        source.args[0],
        call["num_heads"],
        call["in_proj_weight"],
        call["in_proj_bias"],
        call["out_proj_weight"],
        call["out_proj_bias"],
        None if causal else call["attn_mask"],
        causal,
        float(call["dropout_p"]) if call["training"] else 0.0,
        result,
        (source, *(user for user in result.users if is_swap(user))),
    )


def _obstacle(call: dict[str, Any]) -> str | None:
    mask = call["attn_mask"]
    if len(shape_of(call["query"])) != 3:
        return "it attends without a batch"
    if call["query"] is not call["key"] or call["key"] is not call["value"]:
        return "it is no self-attention"
    if call["use_separate_proj_weight"] or call["in_proj_weight"] is None:
        return "it has a projection each for queries, keys and values (kdim, vdim)"
    if call["need_weights"]:
        return "it returns the weights (need_weights=True)"
    if call["key_padding_mask"] is not None:
        return "it has a key_padding_mask (put it into attn_mask, or pad on the right and leave it out)"
    given = [name for name in ("bias_k", "bias_v", "static_k", "static_v") if call[name] is not None]
    given += [name for name in ("add_zero_attn",) if call[name]]
    if given:
        return f"it has keys of its own ({', '.join(given)})"
    return None if mask is None or len(shape_of(mask)) == 2 else "its mask is one for every head"


def is_swap(node: Node) -> bool:
    """Whether a call swaps the first two axes of three."""
    if op_name(node) == "permute":
        axes = argument(node, 1, "dims")
        return tuple(axes if isinstance(axes, (list, tuple)) else node.args[1:]) == (1, 0, 2)
    if op_name(node) not in ("transpose", "swapaxes"):
        return False
    return {argument(node, 1, "dim0"), argument(node, 2, "dim1")} in ({0, 1}, {-3, -2})
