"""Puts the option ``scoring`` into the graph: from the router's statistics to one difficulty per position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile import compat
from cggr_compile.ops.difficulty import ALWAYS
from cggr_compile.options import OptionError, callable_name
from cggr_compile.passes.analysis.effects import mutated_operand
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.nodes import fake_value, same_size, shape_of
from cggr_compile.scorings import SCORINGS
from cggr_compile.scorings.record import STATISTICS

if TYPE_CHECKING:
    from torch.fx import Graph, Node


def difficulty(
    emit: Emitter, statistics: Sequence[Node], scoring: str | Callable[..., Any], doubled: Callable[[], Node]
) -> Node:
    """Difficulty, float32 [B, S], of every position.

    Args:
        statistics: float32 [B, S] each, in the order of STATISTICS.
        scoring: the option.
        doubled: adds the logsumexp of twice the logits to the graph.

    Raises:
        OptionError: a callable that cannot be traced or returns something else, or no reference loss for a scoring that
            reads it.
    """
    if not isinstance(scoring, str):
        return _inline(emit, scoring, statistics)
    values = dict(zip(STATISTICS, statistics, strict=True))
    inputs = SCORINGS[scoring].inputs
    if "doubled" in inputs:
        values["doubled"] = doubled()
    if "reference_loss" in inputs:
        reference = _reference_loss(emit.graph, scoring, statistics[0])
        values["reference_loss"] = emit.method("float", emit.method("detach", reference))
    always = (values[name] for name in ALWAYS)
    further = {name: values[name] for name in inputs if name not in ALWAYS}
    return emit.call(torch.ops.cggr.difficulty.default, *always, scoring, **further)


def _reference_loss(graph: Graph, scoring: str, like: Node) -> Node:
    """The graph input whose name ends in reference_loss: ``L['kwargs']['reference_loss']``, say."""
    found: list[Node] = [
        node
        for node in graph.find_nodes(op="placeholder")
        if compat.source_name(node).rstrip("'\"]").endswith("reference_loss")
    ]
    if len(found) != 1:
        raise OptionError(
            f"scoring={scoring!r} needs one input of the graph named reference_loss, found {len(found)}: "
            "cggr_compile.with_reference_loss(labels, reference_loss), inside the compiled function, makes it one"
        )
    value = fake_value(found[0])
    if not _fits(value, like):
        raise OptionError(
            f"reference_loss must be floating-point of shape {list(shape_of(like))}, one value per position, "
            f"got {value.dtype} of shape {list(value.shape)}"
        )
    return found[0]


def _inline(emit: Emitter, function: Callable[..., Any], statistics: Sequence[Node]) -> Node:
    """The nodes of a user's function of the statistics."""
    name = callable_name(function)
    try:
        traced = torch.fx.symbolic_trace(function).graph
    except Exception as error:
        raise OptionError(f"scoring: {name} cannot be traced by torch.fx: {error}") from error
    inputs = traced.find_nodes(op="placeholder")
    if len(inputs) != len(statistics):
        raise OptionError(f"scoring: {name} must take ({', '.join(STATISTICS)}), it takes {len(inputs)} arguments")
    values: dict[Node, Any] = dict(zip(inputs, statistics, strict=True))
    for node in traced.nodes:
        if node.op in ("get_attr", "call_module"):
            raise OptionError(f"scoring: {name} must compute from its arguments alone, it reads {node.target}")
        if mutated_operand(node) is not None:
            raise OptionError(f"scoring: {name} must not write into its arguments ({node.target})")
        if node.op not in ("call_function", "call_method"):
            continue
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        make = emit.call if node.op == "call_function" else emit.method
        try:
            values[node] = make(node.target, *args, **kwargs)
        except Exception as error:
            raise OptionError(f"scoring: {name} fails at {node.target}: {error}") from error
    output: Any = traced.output_node().args[0]
    result = values.get(output) if isinstance(output, torch.fx.Node) else None
    value = fake_value(result) if result is not None else output
    if result is None or not _fits(value, statistics[0]):
        got = f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
        raise OptionError(f"scoring: {name} must return a floating-point tensor shaped like its arguments, got {got}")
    return emit.method("float", result)


def _fits(value: Any, like: Node) -> bool:
    shape = shape_of(like)
    return (
        isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and value.dim() == len(shape)
        and all(same_size(*sizes) for sizes in zip(value.shape, shape, strict=True))
    )
