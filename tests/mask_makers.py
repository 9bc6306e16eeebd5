"""Attention masks as models write them, and how a test captures what uses them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from cggr_compile.options import Options
from cggr_compile.passes.base import GraphContext, PassResult
from cggr_compile.passes.facts import Attention, Block, LayerStack, Outputs
from cggr_compile.passes.nodes import argument, fake_value
from cggr_compile.passes.semantic import recover_causal_mask
from cggr_compile.passes.semantic.recover_causal_mask import RecoverCausalMask

SDPA = torch._C._nn.scaled_dot_product_attention
B, S = 2, 16


def minimal(cls: type, **given: Any) -> Any:
    """A record with only the fields that this pass reads."""
    return cls(**(dict.fromkeys(cls.__dataclass_fields__) | given))


def attentions(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if node.target is SDPA]


@dataclass
class Captured:
    gm: GraphModule
    inputs: list[Any]

    def context(self, **options: Any) -> GraphContext:
        blocks = []
        for node in attentions(self.gm):
            mask = argument(node, 3, "attn_mask")
            blocks.append(minimal(Block, attentions=(minimal(Attention, kind="sdpa", node=node, mask=mask),)))
        values = [fake_value(node) for node in self.gm.graph.find_nodes(op="placeholder")]
        mode = next(value.fake_mode for value in values if isinstance(value, Tensor))
        stack = minimal(LayerStack, blocks=tuple(blocks))
        ctx = GraphContext(Options(**options), self.inputs, mode)
        ctx.add(stack)
        ctx.add(Outputs())
        return ctx

    def apply(self, **options: Any) -> tuple[PassResult, GraphContext]:
        ctx = self.context(**options)
        with mock.patch.object(recover_causal_mask, "_label_obstacle", return_value=""):  # there is no loss here
            result = RecoverCausalMask()(self.gm, ctx)
        self.gm.graph.eliminate_dead_code()
        self.gm.graph.lint()
        self.gm.recompile()
        for node in self.gm.graph.nodes:
            if node.op == "call_function" and node.users:
                assert "example_value" in node.meta, node
        return result, ctx


def capture(function: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any) -> Captured:
    found: list[Captured] = []

    def record(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found.append(Captured(gm, list(inputs)))
        return gm.forward

    torch.compile(function, backend=record, dynamic=dynamic)(*args, **kwargs)
    return next(one for one in found if attentions(one.gm))


def qkv(size: int = S, batch: int = B) -> Tensor:
    return torch.randn(batch, 3, size, 4, generator=torch.Generator().manual_seed(0))


def attend(build: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Self-attention over x [B, heads, S, d] with the mask that ``build`` makes from S and further inputs."""

    def function(x: Tensor, *inputs: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=build(x.shape[2], *inputs))

    return function


def assert_causal(gm: GraphModule) -> None:
    for node in attentions(gm):
        assert argument(node, 3, "attn_mask") is None
        assert argument(node, 5, "is_causal") is True


def assert_kept(gm: GraphModule) -> None:
    assert not any("_assert_async" in str(node.target) for node in gm.graph.nodes)
    for node in attentions(gm):
        assert isinstance(argument(node, 3, "attn_mask"), Node)
        assert not argument(node, 5, "is_causal", False)


def kinds(result: PassResult) -> set[str]:
    return {mask["kind"] for mask in result.details["masks"]}


def right_padded(*lengths: int, dtype: torch.dtype = torch.int64, size: int = S) -> Tensor:
    return (torch.arange(size) < torch.tensor(lengths)[:, None]).to(dtype)


def left_padded(*lengths: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return right_padded(*lengths, dtype=dtype).flip(1)


# Masks without data.


def tril(s: int) -> Tensor:
    return torch.ones(s, s, dtype=torch.bool).tril()


def additive(s: int) -> Tensor:
    return torch.full((s, s), float("-inf")).triu(1)


def lowest(s: int) -> Tensor:
    mask = torch.full((s, s), torch.finfo(torch.float32).min)
    mask = torch.triu(mask, diagonal=1)
    return mask[None, None].expand(B, 1, -1, -1)


def in_place(s: int) -> Tensor:
    mask = torch.zeros(s, s)
    mask.masked_fill_(torch.arange(s)[None] > torch.arange(s)[:, None], float("-inf"))
    return mask


def written_through_view(s: int) -> Tensor:
    mask = torch.zeros(1, 1, s, s)
    mask[0, 0][torch.arange(s)[None] > torch.arange(s)[:, None]] = 0
    mask[:, :, :, :] = torch.full((s, s), float("-inf")).triu(1)
    return mask


def window(width: int) -> Callable[[int], Tensor]:
    def mask(s: int) -> Tensor:
        query, key = torch.arange(s)[:, None], torch.arange(s)[None]
        return (key <= query) & (key > query - width)

    return mask


def bidirectional(s: int) -> Tensor:
    return torch.ones(s, s, dtype=torch.bool)


def off_by_one(s: int) -> Tensor:
    return torch.ones(s, s, dtype=torch.bool).tril(1)


def without_diagonal(s: int) -> Tensor:
    return torch.ones(s, s, dtype=torch.bool).tril(-1)


def prefix(s: int) -> Tensor:
    return torch.ones(s, s, dtype=torch.bool).tril() | (torch.arange(s) < 3)


def alibi(s: int) -> Tensor:
    return additive(s) - (torch.arange(s)[:, None] - torch.arange(s)[None]).float()


def one_head_differs(s: int) -> Tensor:
    return torch.stack([tril(s), tril(s), bidirectional(s)])


def last_row_differs(s: int) -> Tensor:
    mask = tril(s)
    mask[s - 1, 1] = False
    return mask


def changed_through_alias(s: int) -> Tensor:
    mask = tril(s)
    rows = mask[2:]
    rows[:, 0] = False
    return mask


def random(s: int) -> Tensor:
    return (torch.rand(s, s) >= 0) & tril(s)
