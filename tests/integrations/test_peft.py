"""Adapters of PEFT under the backend: what is routed, with gradients equal to the reference's."""

from __future__ import annotations

import copy

import models
import pytest
import torch
from four_bits import INSTALLED, pack
from reference import Run, assert_same, backward, dense, hf_reference
from training import check_against_reference, metrics, picks

import cggr_compile
from cggr_compile import compat
from cggr_compile.integrations.dora import trace_dora
from cggr_compile.integrations.selective_training import SelectiveTraining
from cggr_compile.passes.patterns.quantised import GEMM_4BIT

peft = pytest.importorskip("peft")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "LoRA": peft.LoraConfig(r=4, target_modules=LINEAR),
    "LoRA of the embedding": peft.LoraConfig(r=4, target_modules=[*LINEAR, "embed_tokens"]),
    "rsLoRA": peft.LoraConfig(r=4, target_modules=LINEAR, use_rslora=True),
    "DoRA": peft.LoraConfig(r=4, target_modules=LINEAR, use_dora=True),
    "DoRA of the embedding": peft.LoraConfig(r=4, target_modules=[*LINEAR, "embed_tokens"], use_dora=True),
    "IA3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "modules_to_save": peft.LoraConfig(r=4, target_modules=LINEAR, modules_to_save=["lm_head", "embed_tokens"]),
}
# An adapter of the head: the loss is that of all positions, exactly, and its gradient that of the selected ones.
OF_HEAD = {
    "LoRA": peft.LoraConfig(r=4, target_modules=[*LINEAR, "lm_head"]),
    "rsLoRA, embedding saved": peft.LoraConfig(
        r=4, target_modules=[*LINEAR, "lm_head"], use_rslora=True, modules_to_save=["embed_tokens"]
    ),
    "DoRA": peft.LoraConfig(r=4, target_modules=[*LINEAR, "lm_head"], use_dora=True),
}


def adapted(config, checkpointing):
    """A tiny model whose adapters do something, attached as the callbacks attach it."""
    model = peft.get_peft_model(models.family("llama"), copy.deepcopy(config))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()
    models.randomise(model)
    return attach(model)


def attach(model, **more):
    model.config.use_cache = False
    options = {"compiler": "eager", "fallback": "error", "selection": "random"}
    options |= {"scoring": "random", "launch_bound": "select", **more}
    assert SelectiveTraining(options).attach(model)
    return model


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", models.slow_but(["DoRA"], KINDS))
def test_adapters(kind, checkpointing):
    model = adapted(KINDS[kind], checkpointing)
    check_against_reference(model, models.make_batch())
    assert metrics(model)["level"] == "routed"


@pytest.mark.parametrize("kind", models.slow_but(["LoRA"], OF_HEAD))
def test_adapters_of_the_head(kind):
    model, batch = adapted(OF_HEAD[kind], False), models.make_batch()
    got = backward(model, model(**batch).loss)
    assert metrics(model)["level"] == "routed", metrics(model)
    want = hf_reference(model, batch, picks(model))
    assert_same(Run(dense(model, batch).loss, got.grads), Run(got.loss, want.grads))


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("checkpointing"),
        pytest.param("plain", marks=pytest.mark.slow),
        pytest.param("nested", marks=[pytest.mark.slow, pytest.mark.skipif(not INSTALLED, reason="bitsandbytes")]),
    ],
)
def test_base_in_four_bits(kind, caplog, monkeypatch):
    """QLoRA: packed products are on every position by itself, and their gradient is that of the rows.

    A checkpoint computes those of query, key and value again, and of the others selected rows.
    """
    parts, partition = [], compat.default_partition
    monkeypatch.setattr(compat, "default_partition", lambda *a, **k: parts.append(partition(*a, **k)) or parts[-1])
    model = peft.get_peft_model(
        pack(models.family("llama", num_hidden_layers=1), kind == "nested"), copy.deepcopy(KINDS["LoRA"])
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    if kind == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()
    attach(model)
    batch = models.make_batch()
    check_against_reference(model, batch)
    ((_, last),) = parts
    again = [node.meta["val"].shape[1] for node in last.graph.nodes if str(node.target) == GEMM_4BIT]
    layers = model.config.num_hidden_layers if kind == "checkpointing" else 0
    assert again.count(batch["input_ids"].shape[1]) == 3 * layers and len(again) == 6 * layers, again
    (report,) = cggr_compile.runtime(model).reports
    assert report.level == "routed" and not report.record("row_sparse").details["densified"]
    assert "mixed without attention" not in caplog.text


def test_prefix_tuning_is_at_the_level_of_the_loss():
    """Its keys and values are in front of every layer's, and no positions of the sequence. Every label is selected."""
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    options = {"fallback": "silent", "selection": "labels", "max_selected": 1.0}
    model = attach(peft.get_peft_model(models.family("llama", num_hidden_layers=1), config), **options)
    batch = models.make_batch()
    got = backward(model, model(**batch).loss)
    figures = metrics(model)
    assert figures["level"] == "loss" and "sees 4 keys that are no positions" in figures["fallback_reason"]
    assert_same(got, dense(model, batch))


def test_dora_caches_and_is_copied_as_before(monkeypatch):
    """What takes its cache's place looks first, clears what there is, and belongs to the layer that was copied."""
    model = peft.get_peft_model(models.family("llama", num_hidden_layers=1), KINDS["DoRA"])
    trace_dora(model)
    twin = copy.deepcopy(model)
    layers = [[m for m in one.modules() if hasattr(m, "_dora_cache")] for one in (model, twin)]
    for layer in (layers[0][0], layers[1][0]):
        layer._dora_cache["weight-norm-default"] = 1
    layers[1][0].train()
    assert layers[0][0]._dora_cache and not layers[1][0]._dora_cache
    assert not compat.is_compiled(twin) and cggr_compile.runtime(twin) is not cggr_compile.runtime(model)
