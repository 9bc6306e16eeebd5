from __future__ import annotations

import json
import logging

import models
import pytest
import torch

from cggr_compile.pipeline import PASSES

STAGES = [
    *(
        "captured",
        "find_loss",
        "find_stack",
        "recover_causal_mask",
        "group_queries",
        "align_targets",
        "choose_selection",
    ),
    *(
        "trained_inputs",
        "check_labels",
        "insert_router",
        "select_rows",
        "return_figures",
        "rewrite_loss",
        "route_gradient",
        "detach_outputs",
    ),
    *("rewritten", "joint_row_sparse", "joint_merge_products", "joint_merge_sums", "joint_materialize_rotary_tables"),
    "joint_resolve_markers",
]


def test_dump(tmp_path):
    model = models.compiled(models.family("llama", num_hidden_layers=1), dump_dir=str(tmp_path))
    batch = models.make_batch()
    # with a padding mask every release of transformers builds a mask tensor
    model(**batch, attention_mask=torch.ones_like(batch["labels"])).loss.backward()
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == [*(f"{i:02d}_{name}.py" for i, name in enumerate(STAGES)), "report.json"]
    for file in files[:-1]:
        compile((tmp_path / file).read_text(), file, "exec")  # readable as Python
    number = f"{STAGES.index('rewrite_loss'):02d}"
    text = (tmp_path / f"{number}_rewrite_loss.py").read_text()
    assert text.startswith(
        f"# graph 0, stage {number}: rewrite_loss\n# pass: rewrite_loss (semantic graph)\n# matched: True"
    )
    assert "cggr.gather_rows" in text and "# operators: +" in text
    report = json.loads((tmp_path / "report.json").read_text())
    joint = [one.name for one in PASSES if one.stage == "joint"]
    assert [p["name"] for p in report["passes"][-len(joint) :]] == joint
    assert report["passes"][-len(joint)]["details"] == {"densified": {}, "densified_at": {}, "dense_attention": {}}


def test_dump_dir_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("CGGR_DUMP_DIR", str(tmp_path))
    models.compiled(models.PlainLM())(**models.make_batch())
    assert (tmp_path / "00_captured.py").exists()


@pytest.mark.slow
def test_further_graphs_get_folders(tmp_path):
    model = models.compiled(models.family("llama", num_hidden_layers=1), dump_dir=str(tmp_path))
    model(**models.make_batch())
    model(**models.make_batch(2, 24))
    assert (tmp_path / "graph_01" / "00_captured.py").exists()


def test_logs(caplog):
    with caplog.at_level(logging.DEBUG, logger="cggr_compile"):
        models.compiled(models.PlainLM())(**models.make_batch())
    assert any("find_stack: matched" in r.message for r in caplog.records)
    assert any("compiled by eager" in r.message for r in caplog.records)


def test_structured_trace(monkeypatch):
    artifacts = {}
    monkeypatch.setattr("cggr_compile.compat.trace_structured", lambda name, text: artifacts.setdefault(name, text))
    models.compiled(models.PlainLM())(**models.make_batch())
    if not artifacts:
        pytest.fail("nothing handed to the structured trace")
    assert "cggr_0_report" in artifacts
