"""Looks into activation checkpoints: inlines their bodies, tagged so that the partitioner recomputes them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from cggr_compile import compat
from cggr_compile.passes.analysis.effects import mutated_operand
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.nodes import fake_value

CALLS = ("call_function", "call_method", "call_module")


class InlineCheckpoints(SemanticPass):
    """Replaces each ``checkpoint(block, x, use_reentrant=False)`` by the block's own nodes.

    Before::

        y = tag_activation_checkpoint(wrap_body_0, x, w, use_reentrant=False)[0]

    After, every node of the body with the metadata that AOTAutograd's own lowering of the operator leaves on it
    (``recompute: PREFER_RECOMPUTE`` and the checkpoint's ``ac_graph_id``)::

        h = linear(x, w)
        y = x + gelu(h)

    AOTAutograd hands the metadata on to the joint graph, where the partitioner saves the inputs of a checkpoint,
    recomputes its nodes in the backward pass and replays their random numbers. Nodes of later passes carry no tag:
    what they compute may be saved, as if they stood between two checkpoints.

    Left alone: selective checkpoints, whose ``context_fn`` chooses operator by operator while AOTAutograd traces.
    """

    name = "inline_checkpoints"
    optional = True

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        calls = _checkpoints(gm)
        if not calls:
            return PassResult(False, "no activation checkpoints")
        obstacles = {call: why for call in calls if (why := _obstacle(gm, call)) is not None}
        regions = [_inline(gm, call) for call in calls if call not in obstacles]
        kept = f"; {len(obstacles)} left alone: {next(iter(obstacles.values()))}" if obstacles else ""
        if not regions:
            return PassResult(False, kept.removeprefix("; "))
        # part of the compiler's cache key (cggr_compile/joint.py): the printed graph does not show the tags
        return PassResult(True, f"{len(regions)} activation checkpoints{kept}", {"regions": regions})


def _checkpoints(gm: GraphModule) -> list[Node]:
    return gm.graph.find_nodes(op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint)


def _body(gm: GraphModule, call: Node) -> GraphModule:
    (attribute, *_), body = call.args, None
    if isinstance(attribute, Node):
        body = getattr(gm, str(attribute.target), None)
    assert isinstance(body, GraphModule), f"{call} has no body"
    return body


def _obstacle(gm: GraphModule, call: Node) -> str | None:
    """Why this checkpoint cannot be inlined."""
    body = _body(gm, call)
    if any(compat.CHECKPOINT_CONTEXT in part.meta for part in body.modules() if isinstance(part, GraphModule)):
        return "selective activation checkpointing (context_fn)"
    inputs, operands = body.graph.find_nodes(op="placeholder"), call.args[1:]
    results = body.graph.output_node().args[0]
    whole = any(user.target is not operator.getitem for user in call.users)
    if whole or len(inputs) != len(operands) or not isinstance(results, (tuple, list)):
        return f"{call} is not called with its body's arguments and results one by one"
    if not all(isinstance(result, Node) for result in results):
        return f"{call} returns a constant"
    writes = any(mutated_operand(node) is not None for node in body.graph.nodes)
    if writes and not all(_same_memory(fake_value(a), fake_value(b)) for a, b in zip(inputs, operands, strict=True)):
        return f"{call} writes in place, and the capture does not show to what"
    return next((why for inner in _checkpoints(body) if (why := _obstacle(body, inner)) is not None), None)


def _same_memory(inner: Any, outer: Any) -> bool:
    if not isinstance(inner, torch.Tensor) or not isinstance(outer, torch.Tensor):
        return inner is outer
    return compat.storage_id(inner) == compat.storage_id(outer)


def _inline(gm: GraphModule, call: Node, region: int | None = None) -> list[str]:
    """Put the body in place of ``call``; returns the names of the nodes that are recomputed.

    ``region``: the outermost checkpoint's number; one inside another is recomputed with it.
    """
    region = compat.next_checkpoint_id() if region is None else region
    body, attribute = _body(gm, call), call.args[0]
    copies: dict[Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), call.args[1:], strict=True))
    with gm.graph.inserting_before(call):
        results: Any = gm.graph.graph_copy(body.graph, copies)
    copied = [copies[node] for node in body.graph.nodes if node.op not in ("placeholder", "output")]
    for node in copied:
        if node.op == "get_attr":
            node.target = _adopt(gm, f"{attribute}_{node.target}", getattr(body, str(node.target)))
    for user in list(call.users):
        user.replace_all_uses_with(results[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)
    if isinstance(attribute, Node) and not attribute.users:
        gm.graph.erase_node(attribute)
        delattr(gm, str(attribute.target))
    names = []
    for node in copied:
        if node.target is torch.ops.higher_order.tag_activation_checkpoint:
            names += _inline(gm, node, region)
        elif node.op in CALLS:
            _tag(node, region)
            names.append(node.name)
            if node.target is torch.ops.higher_order.autograd_function_apply:
                _tag_forward(gm, node, region)
    return names


def _tag(node: Node, region: int) -> None:
    node.meta.update(recompute=CheckpointPolicy.PREFER_RECOMPUTE, ac_graph_id=region)


def _tag_forward(gm: GraphModule, call: Node, region: int) -> None:
    """Tag what an autograd function computes, in a copy: the captured graph has the same body."""
    attribute: Any = call.args[0]
    body = getattr(gm, str(attribute.target))
    graph = Graph()
    graph.output(graph.graph_copy(body.graph, {}))
    for node in graph.nodes:
        if node.op in CALLS:
            _tag(node, region)
    setattr(gm, str(attribute.target), GraphModule(body, graph))


def _adopt(gm: GraphModule, name: str, value: Any) -> str:
    """Make something that a body holds an attribute of ``gm``."""
    name = name.replace(".", "_")
    while hasattr(gm, name):
        name += "_"
    setattr(gm, name, value)
    return name
