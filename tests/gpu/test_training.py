"""The training step on an accelerator: same numbers as the CPU reference, no host synchronisation."""

from __future__ import annotations

import copy

import models
import pytest
import torch
from reference import Picks, hf_reference

import cggr_compile

# and what becomes of their layers of experts
EXPERTS = {
    "mixtral": "2 of 2 layers of experts",
    "qwen3_moe": "2 of 2 layers of experts",
    "olmoe": "2 of 2 layers of experts",
    "deepseek_v3": "1 of 1 layers of experts",
    "gpt_oss": "2 of 2 layers of experts",
}
FAMILIES = ["llama", "qwen3", "gemma2", "gpt2", "gpt_neox", *EXPERTS]


def train_on_cuda(model, batch, **options):
    """(loss, gradients, picks), all on the CPU, of one step through Inductor CUDA."""
    model = copy.deepcopy(model).cuda()
    models.compiled(model, compiler="inductor", **options)
    loss = model(**{k: v.cuda() for k, v in batch.items()}).loss
    loss.backward()
    rt = cggr_compile.runtime(model)
    assert rt.metrics()["matched"] and rt.reports[0].compiler == "Inductor CUDA"
    grads = {n: p.grad.cpu() for n, p in model.named_parameters()}
    return loss.detach().cpu(), grads, Picks(rt.selected.cpu(), rt.weights.cpu())


def error(ours, reference):
    """Norm-wise relative error over all gradients."""
    difference = sum(float((ours[n].double() - g.double()).square().sum()) for n, g in reference.items())
    return (difference / sum(float(g.double().square().sum()) for g in reference.values())) ** 0.5


@pytest.mark.parametrize("kv_gradient", ["stop", "project"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_reference(family, kv_gradient):
    model, batch = models.family(family), models.make_batch(4, 64)
    loss, grads, picks = train_on_cuda(model, batch, kv_gradient=kv_gradient)
    expected = hf_reference(model, batch, picks, kv_gradient=kv_gradient)
    assert abs(loss - expected.loss) < 1e-4 * expected.loss
    assert error(grads, expected.grads) < 1e-4
    control = hf_reference(model, batch, picks, gradient="exact")
    assert error(grads, control.grads) > 1e-3, "the routed and the exact gradient must differ"


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_train_in_bfloat16(family):
    model = models.family(family).to("cuda", torch.bfloat16)
    models.compiled(model, compiler="inductor")
    batch = {name: tensor.cuda() for name, tensor in models.make_batch(4, 64).items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def held():
        with torch.no_grad():
            return float(model.eval()(**batch).loss)

    before = held()
    model.train()
    for _ in range(30):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert held() < 0.8 * before
    runtime = cggr_compile.runtime(model)
    assert runtime.metrics()["matched"]
    (lowered,) = (p for p in runtime.reports[-1].passes if p.name == "lower_experts")
    assert lowered.reason == EXPERTS[family]


def test_bfloat16_is_as_good_as_eager_bfloat16():
    model, batch = models.family("llama"), models.make_batch(4, 64)
    half = copy.deepcopy(model).bfloat16()
    _, grads, picks = train_on_cuda(half, batch)
    expected = hf_reference(model, batch, picks)
    eager = hf_reference(copy.deepcopy(model).bfloat16(), batch, picks)
    assert error(grads, expected.grads) < 1.5 * error(eager.grads, expected.grads) + 1e-3


def test_same_selection_as_on_the_cpu():
    batch = models.make_batch(4, 64)
    cuda_model = models.compiled(models.family("llama").cuda(), selection="random")
    cpu_model = models.compiled(models.family("llama"), selection="random")
    for _ in range(2):
        cuda_model(**{k: v.cuda() for k, v in batch.items()})
        cpu_model(**batch)
        ours, theirs = (cggr_compile.runtime(m).selected.cpu() for m in (cuda_model, cpu_model))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "options", [{}, {"selection": "topk"}, {"selection": "labels"}, {"selection": "stratified"}, {"scope": "batch"}]
)
def test_a_step_does_not_synchronise(options):
    model = models.compiled(models.family("llama").cuda(), compiler="inductor", **options)
    batch = {k: v.cuda() for k, v in models.make_batch(4, 64).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):  # compile and warm up
        model(**batch).loss.backward()
        optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_autocast():
    model, batch = models.family("llama"), models.make_batch(4, 64)
    with torch.autocast("cuda", torch.bfloat16):
        loss, grads, picks = train_on_cuda(model, batch)
    expected = hf_reference(model, batch, picks)
    assert abs(loss - expected.loss) < 0.02 * expected.loss
    with torch.autocast("cpu", torch.bfloat16):
        eager = hf_reference(model, batch, picks)
    assert error(grads, expected.grads) < 1.5 * error(eager.grads, expected.grads) + 1e-3


def test_right_padding_runs_causal():
    model, batch = models.family("llama"), models.make_batch(4, 64)
    batch["attention_mask"] = torch.ones(4, 64, dtype=torch.long)
    batch["attention_mask"][1, 50:] = 0
    batch["labels"][1, 50:] = -100
    _, grads, picks = train_on_cuda(model, batch, kv_gradient="stop")
    assert not (picks.rows[1] >= 50).any()
    assert error(grads, hf_reference(model, batch, picks, kv_gradient="stop").grads) < 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_checkpoints_recompute_on_rows(family):
    model, batch = models.family(family), models.make_batch(4, 64)
    model.config.use_cache = False  # transformers' own warning about it would break the graph
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    _, grads, picks = train_on_cuda(model, batch)
    model.gradient_checkpointing_disable()
    assert error(grads, hf_reference(model, batch, picks).grads) < 1e-4
