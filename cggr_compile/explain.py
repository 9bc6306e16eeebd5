"""``explain``: one call of a model under the backend, and what became of its graphs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cggr_compile import compat
from cggr_compile.explanation import Explanation
from cggr_compile.graph_dump import folder_of, read_stages
from cggr_compile.options import Options
from cggr_compile.registry import registry
from cggr_compile.report import GraphReport
from cggr_compile.trial import device_of, left_alone

if TYPE_CHECKING:
    from cggr_compile.cost.step import Cost


def explain(model: torch.nn.Module, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Explanation:
    """Say what the backend does with ``model(*args, **kwargs)``: what matched, what was rewritten, why not.

    A model that is compiled with ``backend="cggr"`` is called as it is (compiling it now, if this is its first
    call with such inputs). Any other model is compiled aside, with ``options`` and without code generation, and
    stays as it was. Either way the step, the selection and torch's random state are left as they were.

    Args:
        model: a module, compiled or not, in the mode (train or eval) to explain.
        options: for a model that is not compiled yet.

    Returns:
        an :class:`Explanation`; ``print`` it, or read ``.matched``, ``.reason``, ``.passes``, ``.cost``,
        ``.save(folder)``, ``.to_html(path)``.

    Raises:
        ValueError: for unusable options.
    """
    settings = Options.parse(options)
    target = compat.original_module(model)
    with ExitStack() as stack:
        call: Callable[..., Any] = model
        if compat.is_compiled(model):
            own = registry.of_module(target)
        else:
            # a compile of its own, so that nothing stays behind on the model
            from cggr_compile.backend import cggr

            own = stack.enter_context(registry.replaced(target))
            folder = settings.dump_dir or stack.enter_context(TemporaryDirectory())
            aside = {**settings.as_dict(), "compiler": "eager", "fallback": "silent", "dump_dir": folder}
            call = torch.compile(model.forward, backend=cggr, options=aside)
        # parts that are compiled by themselves and not traced into
        runtimes = dict.fromkeys((own, *registry.inside(target)))
        seen = [stack.enter_context(one.observed()) for one in runtimes]
        stack.enter_context(torch.random.fork_rng())
        call(*args, **kwargs)
        graphs = [report for reports in seen for report in reports]
        stages = [_stages(report) for report in graphs]
        for report in graphs:
            report.options["dump_dir"] = settings.dump_dir if call is not model else report.options["dump_dir"]
    if call is model and graphs:
        settings = Options.parse(graphs[0].options)
    count = _counting(target, args, kwargs, settings)
    return Explanation(graphs, stages, _token_ids(graphs, args, kwargs), count)


def _counting(
    model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], options: Options
) -> Callable[[], Cost | None]:
    """Counts the step, in the mode and under the autocast of now."""
    device = device_of(model)
    training, cast, dtype = model.training, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def count() -> Cost | None:
        from cggr_compile.cost.step import cost

        with left_alone(model), torch.autocast(device, dtype, enabled=cast):
            model.train(training)
            return cost(model, args, kwargs, options)

    return count


def _stages(report: GraphReport) -> list[tuple[str, str]]:
    """Names and texts of the dumped stages of a graph, if they are dumped."""
    root = report.options["dump_dir"] or os.environ.get("CGGR_DUMP_DIR")
    return read_stages(folder_of(root, report.index, report.training)) if root else []


def _token_ids(graphs: Sequence[GraphReport], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[list[int]] | None:
    """The batch of tokens whose selection is seen: ``input_ids``, or the first argument of integers in its shape."""
    view = next((report.view for report in graphs if report.view is not None), None)
    if view is None:
        return None
    shape = (len(view.candidate), len(view.candidate[0]))
    for value in (kwargs.get("input_ids"), *args, *kwargs.values()):
        if isinstance(value, Tensor) and tuple(value.shape) == shape and not value.is_floating_point():
            return value.tolist()
    return None
