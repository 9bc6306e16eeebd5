"""What a rewritten graph selects in one batch, to be looked at: scores, selected positions, context, loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from cggr_compile import compat
from cggr_compile.gradient_probe import written_inputs
from cggr_compile.passes.analysis.modes import remove_dead_code
from cggr_compile.passes.base import GraphContext
from cggr_compile.passes.facts import Candidates, RouterScores, Selection
from cggr_compile.pipeline import copy_module


@dataclass(frozen=True)
class SelectionView:
    """The selection of one forward, of each position of its batch, [B][S] in plain lists.

    Attributes:
        score: difficulty; None where no router ran.
        candidate: whether the position may be selected: whether it has a label.
        selected: whether it carries loss.
        gradient: whether it carries gradient; those that are not selected are context.
        weight: what its loss counts; 0 if it is not selected.
    """

    score: list[list[float]] | None
    candidate: list[list[bool]]
    selected: list[list[bool]]
    gradient: list[list[bool]]
    weight: list[list[float]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class SelectionGraph:
    """The part of a rewritten Dynamo graph that selects: a copy, run by plain PyTorch.

    Args:
        gm: the rewritten graph, left as it is. ctx: what the passes found. Of several forwards the first is shown.
    """

    def __init__(self, gm: GraphModule, ctx: GraphContext) -> None:
        self._module = copy_module(gm)
        graph = self._module.graph
        there = {str(node): node for node in graph.nodes}
        selection, candidates = ctx.every(Selection)[0], ctx.every(Candidates)[0]
        rows = selection.gradient or selection
        if str(rows.keep) not in there:  # no operator needs them: they are dead code, and gone
            rows = selection
        wanted: dict[str, Node] = {
            "valid": candidates.valid,
            "rows": selection.rows,
            "keep": selection.keep,
            "weights": selection.weights,
            "gradient_rows": rows.rows,
            "gradient_keep": rows.keep,
        }
        if (scores := ctx.every(RouterScores)) and str(scores[0].difficulty) in there:
            wanted["score"] = scores[0].difficulty
        graph.output_node().args = ({name: there[str(node)] for name, node in wanted.items()},)
        self._written = written_inputs(self._module)
        remove_dead_code(graph)
        self._module.recompile()

    def view(self, args: Sequence[Any]) -> SelectionView:
        """The selection of one call. Computes the router once more, and waits for the device.

        Args:
            args: of the rewritten graph, with those of ``step_interface``. Of those that it writes to copies are used.
        """
        args = [arg.clone() if written else arg for arg, written in zip(args, self._written, strict=True)]
        with torch.no_grad(), compat.modes_kept():
            found: dict[str, Tensor] = Interpreter(self._module).run(*args)
        valid = found["valid"]

        def spread(rows: Tensor, keep: Tensor, values: Tensor) -> Tensor:
            whole = values.new_zeros(len(rows), valid.shape[1] + 1)
            return whole.scatter(1, torch.where(keep, rows, valid.shape[1]), values)[:, :-1]

        rows, keep, all_rows, kept = (found[n] for n in ("rows", "keep", "gradient_rows", "gradient_keep"))
        return SelectionView(
            score=found["score"].float().tolist() if "score" in found else None,
            candidate=valid.expand(len(rows), -1).tolist(),
            selected=spread(rows, keep, keep).tolist(),
            gradient=spread(all_rows, kept, kept).tolist(),
            weight=spread(rows, keep, found["weights"] * keep).tolist(),
        )
