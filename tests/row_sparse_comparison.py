"""The row-sparse backward against the same program without it."""

from __future__ import annotations

import models
import torch
from reference import assert_same, backward

import cggr_compile
from cggr_compile.passes.joint.row_sparse.plan import At, Call
from cggr_compile.passes.joint.row_sparse.rules import Rule


def compare(make, call, tolerance=1e-5, **options):
    """Same weights, selection and random stream, with the pass and without it; returns the pass's record."""
    records = []
    runs = []
    for row_sparse in (True, False):
        torch._dynamo.reset()
        model = make()
        step = models.compiled(lambda model=model: call(model), row_sparse=row_sparse, **options)
        torch.manual_seed(7)
        runs.append(backward(model, step()))
        records.append({p.name: p for p in cggr_compile.runtime(model).reports[-1].passes})
    assert "row_sparse" not in records[1] and records[0]["row_sparse"].matched
    assert_same(runs[0], runs[1], tolerance)
    return records[0]["row_sparse"]


class LosesTheSign(Rule):
    """A wrong rule for a negation, for checks that are to fail."""

    def carry(self, at, node):
        (source,) = node.args
        return Call((At(source, at.layouts[source]),), at.layouts[source], make=lambda rv, rows: rows)
