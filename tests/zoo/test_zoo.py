"""Types of transformers through the backend: a few quick ones, all others slow; and the table of the sweep."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from models import slow_but
from zoo import __main__ as sweep
from zoo import check as checks
from zoo import page
from zoo.check import check
from zoo.sizes import OTHERS
from zoo.tiny import causal_types, model_of

# a type of each kind that something was built for, and the level that it has
KINDS = {
    "gpt2": "routed",  # no loss_type
    "bloom": "routed",  # baddbmm, ALiBi
    "xglm": "routed",  # heads folded into the sequences
    "roformer": "routed",  # a fixed table of positions in every layer
    "granitemoehybrid": "routed",  # experts behind a state space, and behind attention
    "gemma4_text": "routed",  # an embedding for each layer
    "llava:vision": "loss",  # it compares sizes on the host, which breaks the graph
    "openai-gpt": "routed",  # no loss_type either; Dynamo cannot go on behind the call
    "diffllama": "routed",  # two attentions side by side
    "zamba": "routed",  # the embedding goes into every shared block
    "hrm_text": "routed",  # one state waits while the other takes layers
    "phimoe": "routed in part",  # its router's own backward pass writes in place
    "cpmant": "loss",  # a prompt in front of the tokens
    "aria_text": "routed in part",  # experts that sort their tokens
    "mamba": "loss",
    "bert:masked": "routed",
}
REST = [name for name in (*causal_types(), *OTHERS) if name not in KINDS]


@pytest.mark.parametrize("name", slow_but(list(KINDS)[:6], KINDS))
def test_kind(name):
    row = check(name, layers=2 if name == "gemma4_text" else 1)  # it has two kinds of layers
    assert row["status"] == "right", row
    assert page.level(row) == KINDS[name], row


@pytest.mark.slow
def test_checks_that_transformers_leaves_out_break_no_graph(monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
    assert page.level(check("llava:vision", layers=1)) == "routed"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gemma3:vision", ["capture_scalar_outputs"]),
        ("smolvlm:vision", ["capture_scalar_outputs", "capture_dynamic_output_shape_ops"]),
        ("qwen2_5_vl:vision", ["nested_graph_breaks"]),
    ],
)
def test_settings_of_dynamo_with_which_text_and_loss_are_one_graph(name, settings):
    with torch._dynamo.config.patch(dict.fromkeys(settings, True)):
        assert page.level(check(name)) == "routed"


@pytest.mark.slow
def test_a_setting_of_dynamo_for_one_model_alone(monkeypatch):
    def decorated(*args):
        model = model_of(*args)
        model.forward = torch._dynamo.patch_dynamo_config(capture_scalar_outputs=True)(model.forward)
        return model

    monkeypatch.setattr(checks, "model_of", decorated)
    assert page.level(check("gemma3:vision")) == "routed"
    assert not torch._dynamo.config.capture_scalar_outputs


# the limits find what hangs: on two busy cores a type of half a minute takes five
@pytest.mark.slow
@pytest.mark.timeout(1300)
@pytest.mark.parametrize("name", REST)
def test_other_type_is_never_wrong(name):
    row = sweep.in_a_process(name, 1200)
    assert row["status"] in ("right", "eager", "torch.compile"), row


def test_a_wrong_gradient_is_told(monkeypatch):
    """The comparison can fail: what is selected counts half in the reference."""
    real = checks.selected_loss
    monkeypatch.setattr(checks, "selected_loss", lambda *args, **kwargs: 0.5 * real(*args, **kwargs))
    assert check("gpt2", layers=1)["status"] == "wrong"


@pytest.mark.parametrize(("ends", "said"), [("crashes", "ended with -9"), ("hangs", "not done after 2 s")])
def test_a_process_that_ends_badly_is_a_row(ends, said, monkeypatch):
    monkeypatch.setattr(sweep, "check", {"crashes": _crash, "hangs": _hang}[ends])
    row = sweep.in_a_process("llama", 2)
    assert row["status"] == "error" and said in row["why"]


def _crash(name):
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(name):
    import time

    time.sleep(60)


def test_page(tmp_path):
    rows = {
        "a": {"status": "right", "level": "routed", "reason": None, "dense": []},
        "b": {"status": "right", "level": "routed", "reason": None, "dense": ["aten.cat.default in b|c"]},
        "c": {"status": "right", "level": "loss", "reason": "no stack"},
        "d": {"status": "eager", "why": "no sizes"},
        "e:masked": {"status": "wrong", "why": "off by 1"},
    }
    results = {**page.load(tmp_path / "none.json"), "types": rows}
    path = tmp_path / "models.json"
    page.save(path, results)
    assert page.load(path) == results == json.loads(path.read_text())
    assert "3 of 4 causal types" in page.summary(results) and "routed 2 (67%)" in page.summary(results)
    text = page.page(results)
    for line in (
        "| a | routed |  |",
        "| b | routed in part | aten.cat.default in b\\|c |",
        "| c | loss | no stack |",
        "| d | not tried | no sizes |",
        "| e | WRONG | off by 1 |",
    ):
        assert line in text


def test_results_of_other_versions_are_not_kept(tmp_path):
    path = tmp_path / "models.json"
    page.save(path, {"versions": {"torch": "0", "transformers": "0"}, "types": {"a": {}}})
    assert page.load(path)["types"] == {}
