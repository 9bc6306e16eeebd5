from __future__ import annotations

import json

import models
import pytest
import torch

import cggr_compile
from cggr_compile.__main__ import main
from cggr_compile.pipeline import PASSES


@pytest.mark.parametrize("compile_first", [True, False])
def test_explains_and_leaves_everything_as_it_was(compile_first):
    model = models.family("llama")
    if compile_first:
        models.compiled(model)
    rt = cggr_compile.runtime(model)
    random_state = torch.get_rng_state()
    explanation = cggr_compile.explain(model, **models.make_batch())
    assert explanation.matched and "2 blocks" in explanation.reason
    names = [record.name for record in explanation.passes]
    assert names[:3] == ["inline_checkpoints", "make_sizes_static", "functionalize"] and names[-1] == PASSES[-1].name
    assert rt.metrics()["step"] == 0 and rt.selected is None
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    if not compile_first:
        assert model._compiled_call_impl is None


def test_second_explanation_of_a_compiled_model():
    model = models.compiled(models.PlainLM())
    batch = models.make_batch()
    model(**batch)
    assert cggr_compile.explain(model, **batch).matched


def test_prints_a_table(capsys):
    explanation = cggr_compile.explain(models.PlainLM(), **models.make_batch(), options={"gradient": "exact"})
    text = str(explanation)
    assert "rewrite_loss" in text and "gradient='exact' stops nothing" in text and "matched: True" in text


def test_explains_why_not():
    model = models.PlainLM()
    batch = models.make_batch()
    assert "no cross-entropy" in cggr_compile.explain(model, input_ids=batch["input_ids"]).reason
    assert "evaluation" in cggr_compile.explain(model.eval(), **batch).reason


def test_options_are_checked():
    with pytest.raises(ValueError, match="min_tokens_ratio"):
        cggr_compile.explain(models.PlainLM(), **models.make_batch(), options={"min_tokens_ratio": 2})


def test_save(tmp_path):
    path = cggr_compile.explain(models.PlainLM(), **models.make_batch()).save(tmp_path / "new")
    assert json.loads(path.read_text())[0]["matched"] is True
    assert "find_stack" in (path.parent / "report.txt").read_text()


def test_command_line(tmp_path, capsys):
    models.family("llama", num_hidden_layers=1).config.save_pretrained(tmp_path)
    assert main(["explain", str(tmp_path), "--seq", "16", "--save", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "matched: True" in told and "kept for the backward, bytes: dense" in told
    assert (tmp_path / "out" / "00_captured.py").exists()
    assert main(["explain", "no/such/config.json"]) == 2
    assert "no such file" in capsys.readouterr().err
    assert main(["explain", str(tmp_path), "--options", '{"ratio": 1}']) == 2
    assert main(["doctor"]) == 0
    assert "path" in capsys.readouterr().out
