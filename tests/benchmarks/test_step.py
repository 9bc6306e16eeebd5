"""The step benchmark measures what it says, compares only what agrees, and loses nothing when an arm fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers")

import agreement
import arms
import flash_attn_stand_in
import results
import rounds
import step
import timing
from shapes import MODELS, SHAPES, build_model, make_batch

ROOT = Path(__file__).resolve().parent.parent.parent
RUN = ["--shapes=tiny", "--compiler=eager"]


def tiny() -> Any:
    return build_model(SHAPES["tiny"], device="cpu", dtype=torch.float32)


def batch() -> tuple[Tensor, Tensor]:
    return make_batch(SHAPES["tiny"], device="cpu")


# ---------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.slow
def test_command_measures_every_arm(tmp_path: Path) -> None:
    path = tmp_path / "new" / "step.json"
    names = [name for name in arms.ARMS if name not in arms.FLASH]
    command = [sys.executable, "benchmarks/step.py", "--shapes=tiny", "--compiler=eager", "--repeats=2", "--readme"]
    command += [f"--arms={','.join(names)}", f"--json={path}", f"--dump-dir={tmp_path / 'graphs'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    document = json.loads(path.read_text())
    (result,) = document["results"]
    assert list(result["arms"]) == names and result["rounds"] == 2
    assert {"device", "torch", "triton", "transformers", "date", "command"} <= set(document["machine"])
    for name, record in result["arms"].items():
        assert record["status"] == "ok", record
        assert record["compile_s"] > 0 and record["saved_mb"] > 0 and record["tokens_per_s"] > 0
        assert all(len(record["samples"][part]) == 2 and record[part]["median"] > 0 for part in results.PARTS)
        if name not in arms.BASELINES:
            assert record["options"].items() >= arms.SELECTIVE[name].items(), "compiled with another arm's options"
            assert record["metrics"]["matched"] is (name != "dense-cggr")
    losses = {name: record["loss"] for name, record in result["arms"].items()}
    assert losses["fair"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["selective"] != losses["fair"], "all the tokens were trained on"
    assert f"| tiny | selective | {result['arms']['selective']['forward']['median']:.1f} |" in run.stdout
    assert list((tmp_path / "graphs" / "tiny" / "selective").glob("00_captured.py"))


def test_an_arm_that_fails_is_on_record_and_the_others_go_on(tmp_path, monkeypatch, capsys) -> None:
    original = rounds.build_arm

    def build(name: str, *args: Any, **kwargs: Any) -> arms.Step:
        if name == "random":
            raise torch.OutOfMemoryError("no room")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(rounds, "build_arm", build)
    path = tmp_path / "step.json"
    assert step.main([*RUN, "--arms=random,fair", "--repeats=1", f"--json={path}"]) == 1
    found = json.loads(path.read_text())["results"][0]["arms"]
    assert found["random"].pop("traceback").endswith("OutOfMemoryError: no room\n")
    assert found["random"] == {"status": "failed", "error": "OutOfMemoryError: no room"}
    assert found["fair"]["status"] == "ok"
    assert "no room" in capsys.readouterr().out


def test_an_arm_that_fails_late_loses_its_times(tmp_path, monkeypatch) -> None:
    calls = []
    original = rounds.run_step

    def run_step(*args: Any, **kwargs: Any) -> timing.Sample:
        calls.append(1)
        if len(calls) == rounds.WARM_UP + 3:  # the second round
            raise RuntimeError("device lost")
        return original(*args, **kwargs)

    monkeypatch.setattr(rounds, "run_step", run_step)
    path = tmp_path / "step.json"
    assert step.main([*RUN, "--arms=fair", "--repeats=4", f"--json={path}"]) == 1
    (result,) = json.loads(path.read_text())["results"]
    assert "device lost" in result["arms"]["fair"].pop("traceback")
    assert result["arms"] == {"fair": {"status": "failed", "error": "RuntimeError: device lost"}}


def test_an_arm_that_is_compiled_again_loses_its_times(tmp_path, monkeypatch) -> None:
    """Where another arm's graph broke, Dynamo no longer enters what this one has compiled."""
    monkeypatch.setattr(rounds.ShapeRun, "compare", lambda *_: torch._dynamo.reset())
    path = tmp_path / "step.json"
    assert step.main([*RUN, "--layers=1", "--arms=fair", "--repeats=1", f"--json={path}"]) == 1
    assert "compiled again" in json.loads(path.read_text())["results"][0]["arms"]["fair"]["error"]


def test_a_graph_that_is_not_rewritten_is_a_failure(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(arms.SELECTIVE, "exact", {"router_layers": 3})  # more than the model has
    path = tmp_path / "step.json"
    assert step.main([*RUN, "--arms=exact", "--repeats=1", f"--json={path}"]) == 1
    assert "router_layers" in json.loads(path.read_text())["results"][0]["arms"]["exact"]["error"]


def test_arms_of_flash_attention(tmp_path, monkeypatch) -> None:
    """By the stand-in; where the package cannot run, the record has the reason."""
    path = tmp_path / "step.json"
    command = [*RUN, "--layers=1", "--repeats=1", f"--json={path}"]

    def records() -> Any:
        return json.loads(path.read_text())["results"][0]["arms"]

    assert step.main([*command, "--arms=fair-flash"]) == 1
    assert records()["fair-flash"]["status"] == "failed"
    assert "'flash_attention_2' does not, it needs a CUDA device" in records()["fair-flash"]["error"]
    flash_attn_stand_in.install(monkeypatch)
    monkeypatch.setattr("cggr_compile.flash_attention._obstacle", lambda model, backend: "")
    forward, calls = flash_attn_stand_in._forward, []
    monkeypatch.setattr(flash_attn_stand_in, "_forward", lambda *args: calls.append(1) or forward(*args))
    assert step.main([*command, "--arms=fair,fair-flash,selective-flash"]) == 0
    assert len(calls) >= 2, "another attention than the package's"
    found = records()
    assert found["fair-flash"]["loss"] == pytest.approx(found["fair"]["loss"], rel=1e-5)
    assert found["selective-flash"]["metrics"]["matched"]
    assert found["selective-flash"]["passes"]["row_sparse"]["dense_attention"] == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes=tiny,huge"], "huge: not among tiny"),
        (["--arms=dense"], "dense: not among plain"),
        (["--ratio=0"], "--ratio"),
        (["--cuda-graphs"], "--device cuda"),
        (["--layers=0"], "--layers"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        step.main(arguments)
    assert caught.value.code == 2 and message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------
# What is compared


def test_fair_attends_without_a_mask_tensor() -> None:
    arms.check_fair()


def test_check_of_fair_notices_a_mask(monkeypatch) -> None:
    monkeypatch.setattr(arms, "MASKLESS", "sdpa")
    with pytest.raises(RuntimeError, match="mask"):
        arms.check_fair()

    def masked(ids: Tensor, labels: Tensor) -> Tensor:
        x = ids[:, None, :, None].float()
        both = F.scaled_dot_product_attention(x, x, x), F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return sum(both).mean()

    (graph,) = arms.captured(masked, *batch())
    assert arms.plain_causal(graph) == [False, True]


def test_arms_share_parameters_but_not_attention() -> None:
    model = tiny()
    twin = arms.without_mask(model)
    assert all(p is q for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert model.config._attn_implementation == "sdpa"
    assert twin.model.layers[0].self_attn.config._attn_implementation == arms.MASKLESS


def test_gradients_betray_what_losses_do_not() -> None:
    """At random weights a model that looks ahead has the right loss, nearly, and a wrong gradient."""
    model, losses, gradients = tiny(), {}, {}
    for name, causal in (("fair", True), ("plain", True), ("wrong", False)):
        twin = arms.without_mask(model)
        for layer in twin.model.layers:
            layer.self_attn.is_causal = causal
        model.zero_grad()
        loss = arms.loss_of(twin)(*batch())
        loss.backward()
        losses[name], gradients[name] = float(loss.detach()), agreement.first_layer_gradient(model)
    agreement.check_dense({name: losses[name] for name in ("fair", "plain")}, gradients, "float32")
    assert losses["wrong"] == pytest.approx(losses["fair"], rel=agreement.TOLERANCE["bfloat16"][0])
    for dtype in agreement.TOLERANCE:
        with pytest.raises(agreement.Disagreement, match="gradient"):
            agreement.check_dense({"fair": losses["fair"], "wrong": losses["fair"]}, gradients, dtype)
        with pytest.raises(agreement.Disagreement, match="loss of"):
            agreement.check_dense({"fair": 1.0, "plain": float("nan")}, gradients, dtype)


def test_models_have_their_published_sizes() -> None:
    """134.5, 361.8, 1235.8 and 8030.3 million parameters, tied heads counted once."""
    for name, millions in (("135m", 134.5), ("360m", 361.8), ("1b", 1235.8), ("8b", 8030.3)):
        shape = next(shape for shape in SHAPES.values() if shape.model == name)
        model = build_model(shape, device="meta", dtype=torch.bfloat16)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
        assert model.config.vocab_size == MODELS[name]["vocab_size"]
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32, "angles rounded to bfloat16"


def test_models_with_experts_have_their_sizes() -> None:
    """Billions of parameters, and of those that are active for a token."""
    for name, billions, active in (("mixtral", 8.97, 2.63), ("qwen3-moe", 8.10, 1.30)):
        shape = next(shape for shape in SHAPES.values() if shape.model == name)
        model = build_model(shape, device="meta", dtype=torch.bfloat16)
        experts = sum(p.numel() for p in model.parameters() if p.dim() == 3)
        every = sum(p.numel() for p in model.parameters())
        share = model.config.num_experts_per_tok / model.model.layers[0].mlp.experts.num_experts
        assert every / 1e9 == pytest.approx(billions, abs=0.01)
        assert (every - experts + share * experts) / 1e9 == pytest.approx(active, abs=0.01)


# ---------------------------------------------------------------------------------------------------------------
# What is measured


def test_saved_bytes_counts_each_memory_once_and_no_parameter() -> None:
    weight = torch.randn(100, requires_grad=True)

    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x, x[:10], torch.ones(7))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    assert timing.saved_bytes(Keep.apply(weight).sum(), [weight]) == 4 * 7
    # sin keeps the weight, cos keeps the sine; so it does compiled
    assert timing.saved_bytes(weight.sin().cos().sum(), [weight]) == 4 * 100
    assert timing.saved_bytes(weight.sin().cos().sum(), []) == 4 * 200

    def product(w: Tensor) -> Tensor:
        return torch.mm(w.view(10, 10), w.view(10, 10)).softmax(-1).square().sum()

    assert timing.saved_bytes(torch.compile(product, backend="aot_eager")(weight), [weight]) >= 4 * 100


def test_a_step_is_forward_and_backward_from_a_clean_slate() -> None:
    model = tiny()
    run = arms.loss_of(model)
    first = timing.run_step(run, batch(), list(model.parameters()))
    gradient = model.lm_head.weight.grad.clone()
    second = timing.run_step(run, batch(), list(model.parameters()), lead_in=True)
    assert torch.equal(model.lm_head.weight.grad, gradient), "gradients of two steps were added up"
    assert first.loss == second.loss and first.step == first.forward + first.backward > 0
    assert second.step > second.forward + second.backward, "what comes between two steps is missing"
    assert first.peak_mb is None and first.saved_mb == second.saved_mb > 0
    assert timing.run_step(run, batch(), list(model.parameters()), memory=False).saved_mb is None
