"""FlexAttention (arXiv 2412.05496): its mask is computed at the selected queries, its scores may not be modified."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from cggr_compile.passes.base import fake_value, shape_of
from cggr_compile.passes.fx import op_name
from cggr_compile.passes.patterns.attention.base import Arguments, AttentionAdapter, Backward, Forward

if TYPE_CHECKING:
    from cggr_compile.passes.row_sparse.layout import Layout
    from cggr_compile.passes.row_sparse.values import RowValues

aten = torch.ops.aten
prims = torch.ops.prims

BACKWARD = "flex_attention_backward"
# the operator's parameters, in order
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

    def backward(self, node: Node) -> Backward | None:
        return _Backward(node, _given(node)["grad"]) if str(node.target) == BACKWARD else None


class _Backward(Backward):
    def obstacle(self, batch: int) -> str | None:
        given = _given(self.node)
        query, key = shape_of(given["query"]), shape_of(given["key"])
        device = fake_value(given["query"]).device.type
        if device not in DEVICES:
            return f"FlexAttention on {device}"
        if not _identity(_subgraph(given["score_mod"])):
            return "FlexAttention with a score_mod"
        if given["grad_logsumexp"] is not None:
            return "FlexAttention with a gradient of its log-sum-exp"
        if given["kernel_options"].get("BACKEND") == "FLASH":  # its log-sum-exp is to base e
            return "FlexAttention by FlashAttention"
        tables = {shape_of(table)[:2] for table in given["block_mask"][2:6] if table is not None}
        if key[0] != query[0] or any(table[i] not in (1, query[i]) for table in tables for i in (0, 1)):
            return "FlexAttention over keys or masks that sequences share in groups"
        if not _elementwise(_subgraph(given["block_mask"][-1])):
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
    query, key = shape_of(given["query"]), shape_of(given["key"])
    _, _, partial, partial_at, full, full_at, *_, query_block, key_block, mask_mod = given["block_mask"]
    device = fake_value(given["query"]).device
    call = rv.emit.call

    def numbers(size: int, axis: int) -> Node:
        made = call(prims.iota.default, size, start=0, step=1, dtype=torch.int64, device=device, requires_grad=False)
        return call(aten.view.default, made, [size if i == axis else 1 for i in range(4)])

    queries = call(aten.view.default, rv.rows, [rv.batch, 1, rv.slots, 1])
    keys = numbers(key[2], 3)
    places = (numbers(query[0], 0), numbers(query[1], 1), queries, keys)
    found = _evaluate(rv, _subgraph(mask_mod), (*places, *given["mask_buffers"]))
    if query_block == key_block == UNBLOCKED:
        if not shape_of(found):
            return None if _always(_subgraph(mask_mod)) else call(aten.expand.default, found, [1, 1, rv.slots, key[2]])
    else:
        block_of = (
            call(aten.div.Tensor_mode, queries, query_block, rounding_mode="floor"),
            call(aten.div.Tensor_mode, keys, key_block, rounding_mode="floor"),
        )

        def listed(count: Node, at: Node) -> Node:
            """Whether the block of each query and key is in a table: ``at[..., :count]`` are blocks of keys."""
            *lead, width = shape_of(at)
            blocks = -(-key[2] // key_block)
            slot = call(prims.iota.default, width, start=0, step=1, dtype=torch.int64, device=device,
                        requires_grad=False)  # fmt: skip
            used = call(aten.lt.Tensor, slot, call(aten.unsqueeze.default, count, -1))
            index = call(prims.convert_element_type.default, at, torch.int64)
            index = call(aten.where.self, used, index, call(aten.full.default, [], blocks, dtype=torch.int64,
                                                            device=device))  # fmt: skip
            table = call(aten.full.default, [*lead, blocks + 1], False, dtype=torch.bool, device=device)
            table = call(aten.scatter.value, table, -1, index, True)
            return call(aten.index.Tensor, table, [numbers(lead[0], 0), numbers(lead[1], 1), *block_of])

        found = call(aten.bitwise_and.Tensor, found, listed(partial, partial_at))
        if full is not None:
            found = call(aten.bitwise_or.Tensor, found, listed(full, full_at))
    shape = [1] * (4 - len(shape_of(found))) + list(shape_of(found))
    return call(aten.expand.default, found, [*shape[:2], rv.slots, key[2]])


def _subgraph(held: Node) -> Graph:
    part: Any = getattr(held.graph.owning_module, str(held.target))
    return part.graph  # type: ignore[no-any-return]


def _result(graph: Graph) -> Any:
    result = graph.output_node().args[0]
    return result[0] if isinstance(result, (tuple, list)) and len(result) == 1 else result


def _identity(score_mod: Graph) -> bool:
    return _result(score_mod) is next(iter(score_mod.nodes))


def _always(mask_mod: Graph) -> bool:
    """Whether a mask hides nothing: ``new_ones(())``, which is what a call without one gets."""
    result = _result(mask_mod)
    return isinstance(result, Node) and result.target is aten.new_ones.default


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
    if not isinstance(target, torch._ops.OpOverload) or any(shape_of(source) for source in node.all_input_nodes):
        return False
    return target in CONSTANTS or target in CASTS or torch.Tag.pointwise in target.tags


def _evaluate(rv: RowValues, graph: Graph, given: tuple[Any, ...]) -> Node:
    values: dict[Node, Any] = dict(zip(graph.find_nodes(op="placeholder"), given, strict=True))
    for node in graph.nodes:
        if node.op == "call_function":
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = rv.emit.call(node.target, *args, **kwargs)
    return values[_result(graph)]  # type: ignore[no-any-return]
