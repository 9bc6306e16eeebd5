"""Runs every call of one captured graph: for which model, at which ratio, by which compiled variant."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from cggr_compile.call import Call
from cggr_compile.options import Options
from cggr_compile.runtime import Runtime
from cggr_compile.runtime_resolver import RuntimeResolver
from cggr_compile.variance import Gradient, VarianceMeter
from cggr_compile.variant_dispatcher import VariantDispatcher


class CompiledStep:
    """What Dynamo calls in place of the captured graph.

    A call first finds its runtime (``resolver``), then its ratio (the runtime's schedule), then the variant for that,
    which is compiled if no call has needed it before, verified for its first steps, and replayed with CUDA graphs.
    """

    def __init__(self, options: Options, resolver: RuntimeResolver, variants: VariantDispatcher) -> None:
        self._options, self._resolver, self._variants = options, resolver, variants
        # batches of two models are not compared
        self._meters: WeakKeyDictionary[Runtime, VarianceMeter] = WeakKeyDictionary()

    def __call__(self, *args: Any) -> Any:
        call = self._resolver.begin_call(args)
        try:
            variants = self._variants
            ratio = variants.ratios[0]
            if len(variants.ratios) > 1:
                ratio = variants.nearest(call.ratio(self._options))
                if self._options.min_tokens_ratio == "auto":
                    self._measure(call, ratio, args)
            growth = call.growth() if variants.grow else 0
            return variants.at(ratio, args, growth).run(call, args)
        finally:
            self._resolver.end_call()

    def _measure(self, call: Call, ratio: float, args: Sequence[Any]) -> None:
        """Before some steps, measure the error that the selection adds to the gradient."""
        variants = self._variants
        below = next(r for r in variants.ratios if r < 1.0)
        at = min(ratio, below)  # the dense graph has no selection: the one to go to next

        def gradients() -> tuple[Gradient, Gradient]:
            return variants.at(1.0, args).gradient, variants.at(at, args).gradient

        meter = self._meters.get(call.runtime)
        if meter is None:
            meter = self._meters[call.runtime] = VarianceMeter(self._options.measure_every)
        call.measure(partial(meter.measure, args=args, gradients=gradients), at)
