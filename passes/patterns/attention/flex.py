"""FlexAttention (arXiv 2412.05496): its mask is computed at the selected queries, its scores may not be modified."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from cggr_compile import compat
from cggr_compile.passes.facts import Attention
from cggr_compile.passes.nodes import fake_value, op_name, shape_of
from cggr_compile.passes.patterns.attention.base import Arguments, AttentionAdapter, Backward, Forward, Hides

if TYPE_CHECKING:
    from cggr_compile.passes.fx import Emitter
    from cggr_compile.passes.joint.row_sparse.layout import Layout
    from cggr_compile.passes.joint.row_sparse.values import RowValues

aten = torch.ops.aten
prims = torch.ops.prims

BACKWARD = "flex_attention_backward"
# the operators' parameters, in order
FORWARD_PARAMETERS = ("query", "key", "value", "score_mod", "block_mask", "scale", "kernel_options", "score_buffers",
                      "mask_buffers")  # fmt: skip
PARAMETERS = ("query", "key", "value", "out", "logsumexp", "grad", "grad_logsumexp", "score_mod", "joint_graph",
              "block_mask", "scale", "kernel_options", "score_buffers", "mask_buffers")  # fmt: skip
# where its log-sum-exp and its block tables were checked against the rows' operator
DEVICES = ("cpu", "cuda")
# the block size of a call without a BlockMask
UNBLOCKED = 1 << 30
CONSTANTS = {aten.new_ones.default, aten.new_zeros.default, aten.new_full.default, aten.full.default}
CASTS = {aten._to_copy.default, prims.convert_element_type.default, aten.detach.default, aten.alias.default}


class Flex(AttentionAdapter):
    """``flex_attention`` with any elementwise ``mask_mod`` and no ``score_mod``."""

    kind = "flex"

    def recognise(self, node: Node, stream: Collection[Node]) -> Forward | None:
        if op_name(node) != "flex_attention":
            return None
        query, key, value = node.args[:3]
        # its BlockMask is no tensor of the scores' shape: it stays as it is
        return Forward(query, key, value, -2, -2, node, node)  # type: ignore[arg-type]

    def hides(self, attention: Attention, stream: Collection[Node]) -> Hides | str | None:
        given: dict[str, Any] = dict(zip(FORWARD_PARAMETERS, attention.node.args, strict=False)) | attention.node.kwargs
        _, _, partial, partial_at, full, full_at, *_, query_block, key_block, held = given["block_mask"]
        mask_mod = _subgraph(held)
        if query_block == key_block == UNBLOCKED and _always(mask_mod.graph):
            return None if _identity(_subgraph(given["score_mod"]).graph) else "FlexAttention with a score_mod"
        tables: tuple[Node, ...] = (partial, partial_at) if full is None else (partial, partial_at, full, full_at)
        if query_block == key_block == UNBLOCKED:
            tables = ()
        sizes, buffers = shape_of(given["query"])[:3], tuple(given["mask_buffers"])
        if not all(isinstance(size, int) for size in sizes) or not all(isinstance(node, Node) for node in buffers):
            return "FlexAttention of symbolic sizes"
        if mask_mod.graph.find_nodes(op="get_attr"):
            return "FlexAttention whose mask_mod holds constants"
        device = fake_value(attention.key).device
        return _Hides(mask_mod.code, tables, buffers, (query_block, key_block), sizes, device, mask_mod)

    def backward(self, node: Node) -> Backward | None:
        return _Backward(node, _given(node)["grad"]) if str(node.target) == BACKWARD else None


@dataclass(frozen=True)
class _Hides(Hides):
    """``mask_mod`` computes ``code`` from ``buffers``; ``tables`` of its blocks, none where there are no blocks.

    ``sizes``: of the queries, [B, heads, S].
    """

    code: str
    tables: tuple[Node, ...]
    buffers: tuple[Node, ...]
    blocks: tuple[int, int]
    sizes: tuple[int, int, int]
    device: torch.device
    mask_mod: GraphModule = field(compare=False)

    @property
    def inputs(self) -> tuple[Node, ...]:
        return (*self.tables, *self.buffers)

    def previous(self, emit: Emitter) -> Node:
        batch, heads, length = self.sizes

        def seen(*buffers: Tensor) -> Tensor:
            numbers = [torch.arange(size, device=self.device) for size in self.sizes]
            found: Any = self.mask_mod
            # one axis at a time: positions, heads, sequences
            for axes in ((None, None, 0, 0), (None, 0, None, None), (0, None, None, None)):
                found = torch.vmap(found, (*axes, *[None] * len(buffers)))
            return found(*numbers, (numbers[2] - 1).clamp(min=0), *buffers)  # type: ignore[no-any-return]

        def in_blocks(found: Tensor, *tables: Tensor) -> Tensor:
            own = torch.arange(length, device=self.device).view(1, 1, length, 1)
            at = own // self.blocks[0], (own - 1).clamp(min=0) // self.blocks[1]
            listed = _in_blocks(found.unsqueeze(-1), tables, at, -(-length // self.blocks[1]))
            return listed.expand(batch, heads, length, 1).squeeze(-1)

        found = emit.trace(seen, *self.buffers)
        found = emit.trace(in_blocks, found, *self.tables) if self.tables else found
        return emit.method("any", found, 1)


class _Backward(Backward):
    def obstacle(self, batch: int) -> str | None:
        given = _given(self.node)
        query, key = shape_of(given["query"]), shape_of(given["key"])
        device = fake_value(given["query"]).device.type
        if device not in DEVICES:
            return f"FlexAttention on {device}"
        if not _identity(_subgraph(given["score_mod"]).graph):
            return "FlexAttention with a score_mod"
        if given["grad_logsumexp"] is not None:
            return "FlexAttention with a gradient of its log-sum-exp"
        if given["kernel_options"].get("BACKEND") == "FLASH":  # its log-sum-exp is to base e
            return "FlexAttention by FlashAttention"
        tables = {shape_of(table)[:2] for table in given["block_mask"][2:6] if table is not None}
        if key[0] != query[0] or any(table[i] not in (1, query[i]) for table in tables for i in (0, 1)):
            return "FlexAttention over keys or masks that sequences share in groups"
        if not _elementwise(_subgraph(given["block_mask"][-1]).graph):
            return "FlexAttention with a mask_mod that is not elementwise"
        return None

    def arguments(self, rv: RowValues, heads: Layout) -> Arguments:
        given = _given(self.node)
        rows = rv.gather(given["logsumexp"], heads[:3])
        return Arguments(
            *(given["query"], given["key"], given["value"], given["out"]),
            logsumexp=rv.emit.call(aten.mul.Tensor, rows, math.log(2.0)),  # the operator's own is to base 2
            mask=_mask(rv, given),
            causal=False,
            scale=given["scale"],
        )


def _given(node: Node) -> dict[str, Any]:
    return dict(zip(PARAMETERS, node.args, strict=False)) | node.kwargs


def _mask(rv: RowValues, given: dict[str, Any]) -> Node | None:
    """bool [B or 1, heads or 1, K, keys]: which keys the selected queries attend to; None for all.

    The kernels compute only the blocks that the BlockMask lists, and apply ``mask_mod`` only in those that it does
    not list as full, so the same is done here: ``listed & mask_mod | full``.
    """
    (batch, heads, *_), keys = shape_of(given["query"]), shape_of(given["key"])[2]
    _, _, partial, partial_at, full, full_at, *_, query_block, key_block, mask_mod = given["block_mask"]

    def places(rows: Tensor) -> tuple[Tensor, ...]:
        queries = rows.view(rv.batch, 1, rv.slots, 1)
        return _numbers(batch, 0, rows), _numbers(heads, 1, rows), queries, _numbers(keys, 3, rows)

    def expanded(found: Tensor) -> Tensor:
        lead = ([1] * (4 - found.dim()) + list(found.shape))[:2]
        return found.expand(*lead, rv.slots, keys)

    def in_blocks(found: Tensor, queries: Tensor, columns: Tensor, *tables: Tensor) -> Tensor:
        at = queries // query_block, columns // key_block
        return expanded(_in_blocks(found, tables, at, -(-keys // key_block)))

    where = rv.emit.trace(places, rv.rows)
    found = rv.emit.inline(_subgraph(mask_mod), *where, *given["mask_buffers"])
    found = found[0] if isinstance(found, (tuple, list)) else found
    if query_block == key_block == UNBLOCKED:
        return None if _always(_subgraph(mask_mod).graph) else rv.emit.trace(expanded, found)
    tables = (partial, partial_at) if full is None else (partial, partial_at, full, full_at)
    return rv.emit.trace(in_blocks, found, *where[2:], *tables)  # type: ignore[no-any-return]


def _numbers(size: int, axis: int, like: Tensor) -> Tensor:
    """0, 1, ... along one of four axes."""
    return torch.arange(size, device=like.device).view([size if i == axis else 1 for i in range(4)])


def _in_blocks(found: Tensor, tables: Sequence[Tensor], at: tuple[Tensor, Tensor], blocks: int) -> Tensor:
    """``found`` where a block is listed as partial, True where it is listed as full (if there are such tables)."""
    found = found & _listed(tables[0], tables[1], blocks, at)
    return found | _listed(tables[2], tables[3], blocks, at) if len(tables) > 2 else found


def _listed(count: Tensor, table: Tensor, blocks: int, at: tuple[Tensor, Tensor]) -> Tensor:
    """Whether the blocks ``at`` of each query and key are in a table, of ``blocks`` blocks of keys.

    Args:
        count: [B or 1, heads or 1, blocks of queries]. table: [*count.shape, width]; the first ``count`` are blocks.
    """
    slot = torch.arange(table.shape[-1], device=table.device)
    index = torch.where(slot < count[..., None], table.long(), blocks)
    listed = torch.zeros(*count.shape, blocks + 1, dtype=torch.bool, device=table.device).scatter(-1, index, True)
    return listed[_numbers(count.shape[0], 0, table), _numbers(count.shape[1], 1, table), at[0], at[1]]


def _subgraph(held: Node) -> GraphModule:
    part = getattr(held.graph.owning_module, str(held.target))
    assert isinstance(part, GraphModule)
    return part


def _result(graph: Graph) -> Any:
    result = graph.output_node().args[0]
    return result[0] if isinstance(result, (tuple, list)) and len(result) == 1 else result


def _identity(score_mod: Graph) -> bool:
    return _result(score_mod) is next(iter(score_mod.nodes))


def _always(mask_mod: Graph) -> bool:
    """Whether a mask hides nothing: ``new_ones(())``, which is what a call without one gets."""
    result = _result(mask_mod)
    return isinstance(result, Node) and op_name(result) in ("new_ones", "new_ones.default")


def _elementwise(mask_mod: Graph) -> bool:
    """Whether numbers make numbers all through: then tensors of indices make the tensor of the results."""
    result = _result(mask_mod)
    body = [node for node in mask_mod.nodes if node.op not in ("placeholder", "output")]
    if not isinstance(result, Node) or fake_value(result).dtype != torch.bool:
        return False
    return all(isinstance(fake_value(node), torch.Tensor) and not shape_of(node) and _on_numbers(node) for node in body)


def _on_numbers(node: Node) -> bool:
    target: Any = node.target
    if target is aten.index.Tensor:
        return all(index is not None for index in node.args[1])  # type: ignore[union-attr]
    if not isinstance(target, compat.OpOverload) or any(shape_of(source) for source in node.all_input_nodes):
        return False
    return target in CONSTANTS or target in CASTS or torch.Tag.pointwise in target.tags
