"""Makes symbolic sizes static: the row-sparse backward, and much else, needs sizes that are numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Interpreter
from torch.fx.node import map_arg

from cggr_compile import compat
from cggr_compile.passes.analysis.modes import modes_of, switches_recording
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import StaticSizes
from cggr_compile.passes.nodes import fake_value, op_name

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

# graphs that Dynamo must still be able to compile for the same code: one with symbolic sizes, one for evaluation
RESERVE = 2
# higher-order operators whose subgraphs hold no sizes: those of FlexAttention work on single scores
_KNOWN = ("flex_attention",)


class MakeSizesStatic(SemanticPass):
    """Replaces the symbolic sizes of the inputs by their values at this call.

    Before::

        def forward(s0, ids):           # ids [B, s0]
            y = embedding(ids, w).view(-1, s0 * 32)

    After::

        def forward(ids):               # ids [B, 512]
            y = embedding(ids, w).view(-1, 16384)

    Nothing is guarded yet. If the graph is rewritten, the backend tells Dynamo that it holds for these sizes only
    (``compat.pin_size``), and Dynamo captures another graph for others. That ends before Dynamo's recompilation
    limit is reached, where it would give up compiling altogether: the last graph keeps its symbolic sizes.
    """

    name = "make_sizes_static"
    provides = (StaticSizes,)
    optional = True

    def enabled(self, ctx: GraphContext) -> bool:
        # a variant that is compiled later can have no guards on symbolic sizes
        return not ctx.dense or ctx.scheduled

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        inputs = gm.graph.find_nodes(op="placeholder")
        symbolic = [node for node in inputs if not isinstance(fake_value(node), torch.Tensor)]
        if not any(_is_symbolic(value) for node in inputs if isinstance(value := fake_value(node), torch.Tensor)):
            return PassResult(False, "no symbolic sizes")
        obstacle = _obstacle(gm, ctx, inputs, symbolic)
        if obstacle is not None:
            return PassResult(False, f"sizes stay symbolic: {obstacle}")
        left = compat.recompilations_left()
        if left is not None and left <= RESERVE:
            ctx.notices.append(
                "sizes have changed so often that from now on they are symbolic, and the backward pass dense: pad "
                "batches to fewer sizes, or raise torch._dynamo.config.recompile_limit"
            )
            return PassResult(False, "sizes stay symbolic: Dynamo's recompilation limit is near")

        mode = compat.static_fake_mode()
        values = _evaluate(gm, ctx.example_inputs, mode)
        kept = [node for node in inputs if node not in symbolic]
        sizes = {str(node): list(values[node].shape) for node in kept if _is_symbolic(fake_value(node))}
        static = StaticSizes(
            sizes=tuple(size for node in inputs for size in _sizes(fake_value(node)) if isinstance(size, torch.SymInt)),
            kept=tuple(i for i, node in enumerate(inputs) if node not in symbolic),
        )
        ctx.add(static)
        ctx.example_inputs = [ctx.example_inputs[i] for i in static.kept]
        ctx.fake_mode = mode
        _apply(gm, values)
        listed = ", ".join(f"{name} {shape}" for name, shape in sizes.items())
        return PassResult(True, f"one graph for {listed}", {"sizes": sizes})


def has_symbolic_sizes(gm: GraphModule) -> bool:
    """Whether an input's size, or an input, may change from call to call."""
    return any(_is_symbolic(fake_value(node)) for node in gm.graph.find_nodes(op="placeholder"))


def _sizes(value: Any) -> tuple[Any, ...]:
    """Everything about an input that may be symbolic."""
    return (*value.shape, *value.stride(), value.storage_offset()) if isinstance(value, torch.Tensor) else (value,)


def _is_symbolic(value: Any) -> bool:
    return any(isinstance(size, torch.SymInt) for size in _sizes(value))


def _obstacle(gm: GraphModule, ctx: GraphContext, inputs: list[Node], symbolic: list[Node]) -> str | None:
    """Why the sizes should not, or cannot, become numbers."""
    if not ctx.options.row_sparse:
        return "row_sparse=False has no use for static ones"
    examples = [x for x in ctx.example_inputs if isinstance(x, torch.Tensor)]
    if any(compat.marked_dynamic(x) for x in examples):
        return "marked with torch._dynamo.mark_dynamic"
    if any(compat.is_fake(x) for x in examples):
        return "the capture gives no example tensors"
    tensors = [node for node in inputs if node not in symbolic]
    symbols = {symbol for node in tensors for size in _sizes(fake_value(node)) for symbol in compat.symbols(size)}
    for node in symbolic:
        value = fake_value(node)
        if not isinstance(value, torch.SymInt) or not compat.symbols(value) <= symbols:
            return f"{node} changes from call to call and is no size; pass it as a tensor"
    for node in gm.graph.nodes:
        if any(compat.depends_on_data(size) for size in _sizes(fake_value(node))):
            return f"{node} depends on data"
        if isinstance(fake_value(node), torch.SymFloat):
            return f"{node} is a number that may change from call to call"
        unknown = isinstance(node.target, compat.HigherOrderOperator) and op_name(node) not in _KNOWN
        if node.op == "call_module" or unknown:
            return f"{op_name(node)} ({node}) cannot be looked into"
    if not all(isinstance(fake_value(node), torch.Tensor) for node in gm.graph.output_node().all_input_nodes):
        return "the graph returns a size"
    return None


def _evaluate(gm: GraphModule, examples: Sequence[Any], mode: Any) -> dict[Node, Any]:
    """The value of every node: fake tensors with numbers for sizes, and the numbers themselves."""
    evaluation = _Evaluation(gm, mode)
    with mode, compat.modes_kept():
        evaluation.run(*examples)
    return {node: value for node, value in evaluation.env.items() if node.op != "output"}


class _Evaluation(Interpreter):
    """Runs a graph on fake tensors that have numbers for sizes, each node in its own grad mode."""

    def __init__(self, gm: GraphModule, mode: Any) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.mode, self.modes = mode, modes_of(gm.graph)

    def run_node(self, n: Node) -> Any:
        if switches_recording(n):
            return None
        with torch.set_grad_enabled(self.modes[n].records):
            return super().run_node(n)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        example = super().placeholder(target, args, kwargs)
        return self._fake(example) if isinstance(example, torch.Tensor) else compat.hint(example)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._fake(super().get_attr(target, args, kwargs))

    def _fake(self, value: Any) -> Any:
        return self.mode.from_tensor(value) if isinstance(value, torch.Tensor) else value


def _apply(gm: GraphModule, values: dict[Node, Any]) -> None:
    """Record the values; numbers and shapes take the place of the nodes that computed them."""
    known = {n: value for n, value in values.items() if not compat.enters_or_leaves_vmap(n)}
    numbers: dict[Node, Any] = {n: value for n, value in known.items() if isinstance(value, (bool, int, float))}
    numbers |= {n: tuple(value) for n, value in values.items() if isinstance(value, torch.Size)}
    for node, value in values.items():
        node.meta["example_value"] = value
        node.args, node.kwargs = map_arg((node.args, node.kwargs), lambda n: numbers.get(n, n))
    for node in numbers:
        gm.graph.erase_node(node)
