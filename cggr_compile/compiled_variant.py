"""A variant of a captured graph, compiled: what runs one call of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from cggr_compile import compat, lowerings, pass_records
from cggr_compile.call import Call
from cggr_compile.causes import Cause
from cggr_compile.dense_layers import dense_layers
from cggr_compile.gradient_probe import GradientProbe, written_inputs
from cggr_compile.graph_dump import GraphDump
from cggr_compile.graph_variant import GraphVariant
from cggr_compile.lower import lower_dense, lower_selective
from cggr_compile.passes.facts import Block, LayerStack, Outputs
from cggr_compile.passes.step_interface import example_step_inputs
from cggr_compile.pipeline import copy_module
from cggr_compile.replay import Replay
from cggr_compile.report import Verification
from cggr_compile.runtime import Runtime
from cggr_compile.runtime_resolver import RuntimeResolver
from cggr_compile.selection_view import SelectionGraph
from cggr_compile.variance import Gradients
from cggr_compile.verify import VerificationError, Verifier, unverifiable


class CompiledVariant:
    """Compiles a variant and runs it: gives it the runtime's state, verifies, takes off what it returns besides.

    Args:
        inputs: the captured graph's arguments.
        measured: whether its gradient is compared with another variant's.
    """

    def __init__(
        self, variant: GraphVariant, inputs: Sequence[Any], resolver: RuntimeResolver, measured: bool = False
    ) -> None:
        self._resolver, self.report = resolver, variant.report
        self._kept = None if variant.static is None else variant.static.kept
        self._training, self._selective = variant.training, variant.selective
        self._returns, self._scheduled = variant.returns, variant.ctx.scheduled
        self._doublings = variant.doublings
        self._overwritten = variant.configuration.replays
        self._verifier: Verifier | None = None
        self._verify_steps = variant.ctx.options.verify
        if variant.configuration.engine != "eager":
            lowerings.register()
        inputs = self._arguments(inputs)
        # before a compiler changes the graph
        if self._selective:
            self._selects = SelectionGraph(variant.graph, variant.ctx)
        self._probe = _probe(variant, inputs) if measured else None
        if self._selective:
            self._compile_selective(variant, inputs)
        else:
            self._compiled = lower_dense(variant.graph, inputs, variant.configuration, variant.report, variant.dump)

    def run(self, call: Call, args: Sequence[Any]) -> Any:
        """One call of the captured graph: the user's results."""
        args = self._arguments(args)
        if not self._training:
            return self._compiled(*args)  # not noted as the last graph that ran
        if self._verify_steps and not call.repeats:
            self._verify(call, args)
        if self._selective:
            # predictors first: the state begins the step
            predictors = call.predictors(self._returns.predictors, self._device)
            step_inputs = [call.state(self._device), *predictors]
            call.look(self.report, lambda: self._selects.view([*args, *step_inputs]))
            results = self._compiled(*args, *step_inputs)
        else:
            every_token = self._scheduled and self.report.cause is Cause.EVERY_TOKEN  # else a piece, beside the step's
            if every_token or call.runtime.agreement is not None:  # other processes' steps go on
                call.advance()
            results = self._compiled(*args)
        outputs, others = self._returns.split(results)
        others = others.clone() if self._overwritten else others
        call.record(self.report, others)
        if self._doublings:
            call.grow(others.stats, self._doublings)
        return tuple(outputs)

    def gradient(self, args: Sequence[Any]) -> Gradients:
        """Gradients of the objective beside the training step; of a measured variant only."""
        if self._probe is None:
            raise ValueError("the gradient of this variant is not measured")
        step_inputs = list[Tensor]()
        if self._selective:
            runtime = self._resolver.runtime
            predictors = runtime.predictors(self._returns.predictors, self._device)
            step_inputs = [runtime.other_state(self._device), *predictors]
        return self._probe.gradient(self._compiled, self._arguments(args), *step_inputs)

    def _arguments(self, args: Sequence[Any]) -> list[Any]:
        return list(args) if self._kept is None else [args[i] for i in self._kept]

    def _compile_selective(self, variant: GraphVariant, inputs: list[Any]) -> None:
        further = example_step_inputs(variant.graph.graph, len(inputs))
        self._device = further[0].device
        with compat.static_inputs(further):
            self._lower(variant, inputs, [*inputs, *further])

    def _lower(self, variant: GraphVariant, inputs: list[Any], example: list[Any]) -> None:
        graph, options, report, resolver = variant.graph, variant.ctx.options, variant.report, self._resolver
        engine, patches = variant.configuration.engine, dict(variant.configuration.patches)
        semantic = copy_module(graph) if options.verify else graph  # a compiler may change the graph it gets
        ours = self._overwritten and not any(written_inputs(graph))  # else Inductor's, which see to what is written
        if ours:
            patches[compat.CUDA_GRAPHS] = False
        with pass_records.kept(graph, example, engine, options, report):
            self._compiled = lower_selective(graph, example, engine, options, report, variant.dump, patches)
        if ours:
            parameters = [i for i, value in enumerate(inputs) if isinstance(value, Parameter)]
            self._compiled = Replay(
                self._compiled,
                parameters,
                self._device,
                lambda: resolver.runtime,
                lambda why: resolver.runtime.notify(why),
            )
        blocks, dense = list[Block](), set[int]()
        for forward in variant.ctx.forwards:
            with variant.ctx.of(forward):
                stack, found = variant.ctx.get(LayerStack), variant.ctx[Outputs]
            if stack is not None:
                dense |= {len(blocks) + i for i in found.dense_blocks}
                blocks += stack.blocks
        if message := dense_layers(report, blocks, dense):
            resolver.runtime.warn(message)
        if options.verify:
            self._verifier = self._make_verifier(variant, semantic, example, patches)
        variant.captured = None  # the verifier's, for one step

    def _make_verifier(
        self, variant: GraphVariant, semantic: Any, example: list[Any], patches: dict[str, Any]
    ) -> Verifier | None:
        """The same graph once more, with a dense backward."""
        report = variant.report
        if why := unverifiable(report, variant.ctx.options, self._device):
            nothing_to_verify(self._resolver.runtime, report, why)
            return None
        options = dataclasses.replace(variant.ctx.options, row_sparse=False)
        patches = {**patches, compat.CUDA_GRAPHS: False}  # it runs a few times only
        dense = dataclasses.replace(report, options=options.as_dict(), passes=[])
        with compat.separate_tracing_context():
            reference = lower_selective(
                copy_module(semantic),
                example,
                variant.configuration.engine,
                options,
                dense,
                GraphDump(None, dense, "dense"),
                patches,
            )
        steps = variant.ctx.options.verify
        probe = GradientProbe(semantic, self._device, self._returns)
        return Verifier(self._compiled, reference, probe, steps, variant.captured)

    def _verify(self, call: Call, args: Sequence[Any]) -> None:
        verifier, failure = self._verifier, None
        if verifier is not None:
            if verifier.remaining <= 1:
                self._verifier = None  # and with it, after this step, the dense backward
            try:
                verifier.step(args, call, self.report)
            except VerificationError as error:
                failure = error
        # a process that went on alone would wait for this one's gradients
        heard = call.hear_failures("" if failure is None else str(failure), self._verify_steps)
        if failure is not None:
            raise failure
        if heard:
            raise VerificationError(heard)


def nothing_to_verify(runtime: Runtime, report: Any, why: str) -> None:
    """Say once that the option ``verify`` has nothing to compare."""
    report.verification = Verification(note=why)
    runtime.notify(f"verify: nothing to compare: {why}")


def _probe(variant: GraphVariant, inputs: Sequence[Any]) -> GradientProbe:
    device = next(t.device for t in inputs if isinstance(t, Tensor) and t.requires_grad)
    objective = sorted({place for outputs in variant.ctx.every(Outputs) for place in outputs.objective})
    return GradientProbe(variant.graph, device, variant.returns, objective)
