"""Captures a function's Dynamo graph and takes it through a prefix of the passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from cggr_compile import compat
from cggr_compile.options import Options
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.nodes import op_name
from cggr_compile.pipeline import apply, copy_module, semantic_passes


class Captured:
    """The first graph of a call: ``gm``, its inputs, and what the passes made of it."""

    def __init__(self, function: Callable[..., Any], *args: Any, options: dict[str, Any] | None = None, **kwargs: Any):
        graphs: list[tuple[GraphModule, list[Any]]] = []

        def keep(gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            graphs.append((copy_module(gm), list(inputs)))
            return gm.forward

        torch.compile(function, backend=keep)(*args, **kwargs)
        self.gm, self.inputs = graphs[0]
        options = {"router_precision": "model", **(options or {})}  # the same graph on every processor
        self.ctx = GraphContext(Options.parse(options), self.inputs, compat.capture_fake_mode(self.gm))
        self.results: dict[str, PassResult] = {}

    def run(self, upto: str, passes: Sequence[SemanticPass] | None = None) -> PassResult:
        """Run the passes that have not run yet, up to the one named ``upto``; checks the graph after each."""
        for graph_pass in semantic_passes(self.ctx) if passes is None else passes:
            if graph_pass.name in self.results:
                continue
            before = self.operators()
            self.ctx.running = graph_pass
            result = self.results[graph_pass.name] = apply(graph_pass, self.gm, self.ctx)
            self.ctx.running = None
            self.gm.graph.lint()
            if graph_pass.analysis or not result.matched:
                assert self.operators() == before, f"{graph_pass.name} changed a graph it must leave alone"
            if graph_pass.name == upto:
                break
            assert result.cause is None, f"{graph_pass.name}: {result.reason}"
        return result

    def operators(self) -> Counter[str]:
        return Counter(op_name(node) for node in self.gm.graph.nodes if node.op.startswith("call_"))

    def text(self, after: str | None = None) -> str:
        """One line per call: ``name = op(inputs)  # shape``; from the node ``after`` on."""
        lines = []
        seen = after is None
        for node in self.gm.graph.nodes:
            if seen and node.op.startswith("call_"):
                value = node.meta.get("example_value")
                shape = f"  # {list(value.shape)}" if isinstance(value, torch.Tensor) else ""
                lines.append(f"{node.name} = {op_name(node)}({', '.join(map(str, node.args))}){shape}")
            seen = seen or node.name == after
        return "\n".join(lines)

    def check_shapes(self) -> None:
        """Every call carries a fake value, and evaluating it again gives the same shape."""
        from torch.fx.node import map_arg

        for node in self.gm.graph.nodes:
            if node.op not in ("call_function", "call_method") or "example_value" not in node.meta:
                continue
            value = node.meta["example_value"]
            if not isinstance(value, torch.Tensor):
                continue
            function = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["example_value"])
            with self.ctx.fake_mode:
                again = function(*args, **kwargs)
            assert again.shape == value.shape, f"{node}: recorded {value.shape}, is {again.shape}"


def execute(captured: Captured, *nodes: Node) -> Any:
    """Values of nodes of the captured graph on its own inputs."""
    graph = captured.gm.graph
    output = graph.output_node()
    output.args = (tuple(nodes),)
    graph.eliminate_dead_code()
    captured.gm.recompile()
    names = [str(n) for n in graph.find_nodes(op="placeholder")]
    inputs = [*captured.inputs, torch.tensor([0, 0])][: len(names)]
    return captured.gm(*inputs)
