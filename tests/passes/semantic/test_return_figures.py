from __future__ import annotations

import models
import pytest
from capture import Captured

from cggr_compile.passes.nodes import op_name


def returned(measured, **options):
    """How often norms of the rows' gradients are computed, and their sums; and all operators."""
    captured = Captured(models.PlainLM(), **models.make_batch(2), options=options)
    captured.ctx.measured = measured
    captured.run("return_figures")
    asked = [node.args[-1] for node in captured.gm.graph.nodes if op_name(node) == "linear_cross_entropy.default"]
    found = captured.operators()
    assert len(asked) == (options["cross_entropy"] == "fused") and found["stats.default"] == 1
    return found["gradient_norms.default"] + sum(asked), found["gradient_moments.default"], found


@pytest.mark.parametrize("head", ["logits", "fused"])
def test_gradients_are_computed_where_somebody_reads_them(head):
    norms, sums, read = returned(True, scoring="random", cross_entropy=head)
    assert (norms, sums) == (1, 1)
    assert returned(False, scoring="learned", cross_entropy=head)[:2] == (1, 0), "the predictor has sums of its own"
    norms, sums, alone = returned(False, scoring="random", cross_entropy=head)
    assert (norms, sums) == (0, 0) and read.total() > alone.total() and not alone - read
