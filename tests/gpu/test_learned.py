"""``scoring="learned"`` on a GPU: the same learning as the operators' by themselves, replayed too, and nobody waits."""

from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F

import cggr_compile
from cggr_compile.ops.predictor import SUMS, fit_reference, new_predictor, predict_reference

LEARNED = {"scoring": "learned", "selection": "importance", "min_tokens_ratio": 0.25, "compiler": "inductor"}
BATCH = models.make_batch(4, 64)
TARGET = F.pad(BATCH["labels"], (0, 1), value=-100)[:, 1:]
OPTIONS = [{}, {"cross_entropy": "fused"}, {"cuda_graphs": True}, {"cuda_graphs": True, "cross_entropy": "fused"}]


def compiled(**options):
    torch._dynamo.reset()
    model = models.family("llama").cuda()
    return models.compiled(model, **{**LEARNED, **options}), {name: each.cuda() for name, each in BATCH.items()}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_learns_as_on_the_cpu(options):
    model, batch = compiled(router_layers=1, **options)
    runtime, cpu, found = cggr_compile.runtime(model), models.family("llama"), []
    handle = cpu.model.layers[0].register_forward_hook(lambda _module, _inputs, output: found.append(output))
    with torch.no_grad():
        logits = cpu(BATCH["input_ids"]).logits
    handle.remove()
    (hidden,), weight = found, cpu.lm_head.weight.detach()
    norms = (logits.softmax(-1) - F.one_hot(TARGET.clamp(min=0), models.VOCAB)).norm(dim=-1)
    state = new_predictor(2 * models.HIDDEN)
    for _ in range(6):
        model.zero_grad()
        model(**batch).loss.backward()
        rows, weights = runtime.selected.cpu().clamp(min=0), runtime.weights.cpu()
        own = hidden.gather(1, rows[..., None].expand(-1, -1, models.HIDDEN))
        state = fit_reference(state, own, weight, TARGET.gather(1, rows), norms.gather(1, rows), weights)
        (got,) = runtime._predictors._states.values()
        found, wanted = (predict_reference(each, hidden, weight, TARGET) for each in (got.cpu(), state))
        torch.testing.assert_close(found, wanted, atol=5e-3, rtol=0)
        torch.testing.assert_close(got[: SUMS + 1].cpu(), state[: SUMS + 1], atol=1e-3, rtol=1e-3)
    assert runtime.metrics()["score_correlation"] is not None and state[SUMS] == 6


@pytest.mark.parametrize("options", OPTIONS[::2], ids=str)
def test_it_does_not_synchronise(options):
    model, batch = compiled(**options)
    for _ in range(3):
        model(**batch).loss.backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            model.zero_grad()
            model(**batch).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    (state,) = cggr_compile.runtime(model)._predictors._states.values()
    assert state[SUMS] == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coarser_models_learn(dtype):
    model, batch = compiled()
    with torch.autocast("cuda", dtype=dtype):
        for _ in range(4):
            model(**batch).loss.backward()
    (state,) = cggr_compile.runtime(model)._predictors._states.values()
    assert state.isfinite().all() and state[SUMS] == 4
