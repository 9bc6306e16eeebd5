from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F
from capture import execute

from cggr_compile import compat
from cggr_compile.passes.facts import RouterScores


@pytest.mark.parametrize("layers", [None, 2, "full"])
@pytest.mark.parametrize("scoring", ["entropy", "combined"])
def test_difficulty_is_the_truncated_models(layers, scoring, decoder_step, batch):
    decoder = models.Decoder()
    captured = decoder_step({"router_layers": layers, "scoring": scoring}, decoder)
    assert captured.run("insert_router").matched
    captured.check_shapes()
    router = captured.ctx.get(RouterScores)
    assert not router.difficulty.meta["example_value"].requires_grad
    difficulty, top1, entropy = execute(captured, router.difficulty, router.top1, router.entropy)

    ids, labels = batch.values()
    x = decoder.wte(ids) + decoder.wpe(torch.arange(ids.shape[1]))
    for block in decoder.blocks[: {None: 1, 2: 2, "full": 4}[layers]]:
        x = block(x)
    p = decoder.lm_head(decoder.ln_f(x)).softmax(-1)
    expected_entropy = torch.distributions.Categorical(p).entropy()
    torch.testing.assert_close(entropy, expected_entropy.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(top1, p.max(-1).values.detach(), atol=1e-5, rtol=1e-4)
    expected = expected_entropy - p.max(-1).values
    if scoring == "combined":
        two = p.topk(2).values
        target = F.pad(labels[:, 1:], (0, 1), value=-100)
        nll = -p.log().gather(-1, target.clamp(min=0)[..., None])[..., 0] * (target >= 0)
        expected = expected + 1 - (two[..., 0] - two[..., 1]) + nll
    torch.testing.assert_close(difficulty, expected.detach(), atol=1e-4, rtol=1e-4)


def test_random_scoring_runs_no_router(decoder_step):
    captured = decoder_step({"scoring": "random"})
    result = captured.run("insert_router")
    assert not result.matched and captured.ctx.get(RouterScores) is None


@pytest.mark.parametrize(
    ("precision", "native", "expected"),
    [
        ("auto", True, torch.bfloat16),
        ("auto", False, torch.float32),
        ("bf16", False, torch.bfloat16),
        ("fp8", True, torch.float32),
        ("model", True, torch.float32),
    ],
)
def test_precision(monkeypatch, decoder_step, precision, native, expected):
    monkeypatch.setattr(compat, "cpu_multiplies_bf16", lambda: native)
    decoder = models.Decoder()
    captured, exact = (decoder_step({"router_precision": p}, decoder) for p in (precision, "model"))
    for each in (captured, exact):
        each.run("insert_router")
    captured.check_shapes()
    (score,) = captured.gm.graph.find_nodes(op="call_function", target=torch.ops.cggr.score.default)
    assert {arg.meta["example_value"].dtype for arg in score.args[:2]} == {expected}
    assert score.args[-1] == (precision == "fp8")
    found = [execute(each, each.ctx.get(RouterScores).difficulty)[0] for each in (captured, exact)]
    assert found[0].dtype == torch.float32
    ranks = torch.stack([value.flatten().argsort().argsort().float() for value in found])
    assert torch.corrcoef(ranks)[0, 1] > 0.99
