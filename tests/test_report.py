from __future__ import annotations

import json
import logging

import models
import pytest
import torch

from cggr_compile.__main__ import main
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
        "rewrite_loss",
        "return_figures",
        "route_gradient",
        "detach_outputs",
    ),
    *(
        "rewritten",
        "joint",
        "joint_row_sparse",
        "joint_merge_products",
        "joint_merge_sums",
        "joint_materialize_rotary_tables",
    ),
    "joint_resolve_markers",
]


def test_dump(tmp_path, capsys):
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
    assert "  # <- rewrite_loss\n" in text
    argument = '    layers_0_q_proj_weight: "f32[32, 32]",  # model.layers.0.self_attn.q_proj.weight\n'
    assert argument in text
    joint = (tmp_path / f"{STAGES.index('joint_row_sparse'):02d}_joint_row_sparse.py").read_text()
    assert argument.split(",  #")[0] in joint and "  # <- row_sparse\n" in joint
    before, after = (str(tmp_path / name) for name in ("detach_outputs", STAGES[0]))
    assert main(["diff", before, before]) == 0 and capsys.readouterr().out == ""
    assert main(["diff", after, before]) == 1
    assert '\n+    cggr_state: "i64[2]",\n' in (printed := capsys.readouterr().out) and "# matched" not in printed
    assert main(["diff", str(tmp_path / "1"), before]) == 2
    assert "stage must name one file" in capsys.readouterr().err
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
    def logged(level):
        caplog.clear()
        torch._dynamo.reset()
        with caplog.at_level(level, logger="cggr_compile"):
            model = models.compiled(models.family("llama", num_hidden_layers=1))
            model(**models.make_batch()).loss.backward()
        return [r.getMessage() for r in caplog.records]

    brief, full = logged(logging.INFO), logged(logging.DEBUG)
    assert any("find_stack: matched" in line for line in brief) and any("compiled by eager" in line for line in brief)
    assert len(brief) <= 50
    new = [line for line in full if " + " in line and "# <- " in line]
    assert any(line.startswith("select_rows: + pack_rows") and "cggr.pack_rows" in line for line in new)
    assert any(line.startswith("joint_row_sparse: + ") for line in new)
    assert not any("def forward" in line or "modeling_llama" in line for line in full)  # not whole graphs


def test_structured_trace(monkeypatch):
    artifacts = {}
    monkeypatch.setattr("cggr_compile.compat.trace_structured", lambda name, text: artifacts.setdefault(name, text()))
    model = models.compiled(models.family("llama", num_hidden_layers=1))
    model(**models.make_batch()).loss.backward()
    assert "cggr_0_report" in artifacts and "cggr_0_00_captured.py" in artifacts
    stages = [name.split("_", 3)[3] for name in artifacts if name.endswith(".py")]
    assert "rewrite_loss.py" in stages and "joint_row_sparse.py" in stages
    assert "def forward(" in artifacts["cggr_0_00_captured.py"]
