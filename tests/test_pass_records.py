"""What the optimising passes found: still told where Inductor's cache had the compiled graph."""

from __future__ import annotations

import uuid
import warnings

import models
import pytest
import torch

import cggr_compile
from cggr_compile import compat, joint, pass_records
from cggr_compile.passes.joint.row_sparse.rule import RULES


def step():
    """Records of the optimising passes, and the warnings about what stays dense, of a step that is compiled anew."""
    torch._dynamo.reset()
    model = models.family("gpt_neox", num_hidden_layers=1)
    models.compiled(model, compiler="inductor", scoring="random")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model(**models.make_batch()).loss.backward()
    explanation = cggr_compile.Explanation(cggr_compile.runtime(model).reports)
    records = {p.name: p for p in explanation.passes if p.stage == "joint"}
    return records, [str(w.message) for w in told if "computes every position" in str(w.message)], str(explanation)


@pytest.mark.slow
def test_a_cached_graph_tells_what_its_passes_found(monkeypatch, tmp_path):
    key = uuid.uuid4().hex  # never seen by the cache, whose compiled C++ header stays in use
    monkeypatch.setattr(joint, "source_digest", lambda: key)
    monkeypatch.delitem(RULES, torch.ops.aten.cat.default)  # its fused projection stays dense
    monkeypatch.setattr(compat, "inductor_cache_dir", lambda: tmp_path)
    ran, warned, _ = step()
    cached, warned_again, _ = step()
    (kept,) = (tmp_path / "cggr").glob("*")
    kept.unlink()
    unknown, silent, text = step()

    assert warned and warned_again == warned and not silent
    assert ran["row_sparse"].details["densified"]
    for name, record in ran.items():
        assert cached[name].reason == pass_records.CACHED + record.reason
        told = (cached[name].matched, cached[name].details, cached[name].added, cached[name].removed)
        assert told == (record.matched, record.details, record.added, record.removed)
        assert unknown[name].matched is None and unknown[name].reason == pass_records.NOT_KEPT
    assert "?" in text
