from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F
from capture import Captured, execute

from cggr_compile.passes.facts import Selection


def run(captured):
    assert captured.run("rewrite_loss").matched
    captured.check_shapes()
    loss = captured.gm.graph.output_node().args[0][0]
    selection = captured.ctx[Selection]
    return execute(captured, loss, selection.rows, selection.keep, selection.weights)


def reference(decoder, batch, rows, keep, weights, **kwargs):
    """The weighted sum over the selected rows."""
    ids, labels = batch.values()
    target = F.pad(labels[:, 1:], (0, 1), value=-100)
    logits = decoder(ids).gather(1, rows[:, :, None].expand(-1, -1, models.VOCAB))
    each = F.cross_entropy(logits[keep].float(), target.gather(1, rows)[keep], reduction="none", **kwargs)
    return (each * weights[keep]).sum()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("selection", ["importance", "topk"])
def test_mean_divides_by_the_candidates(selection, smoothing, decoder_step, batch):
    decoder = models.Decoder()
    loss, *picked = run(decoder_step({"selection": selection}, decoder=decoder, label_smoothing=smoothing))
    count = (batch["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(loss, reference(decoder, batch, *picked, label_smoothing=smoothing) / count)
    assert (loss - F.cross_entropy(decoder(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())).abs() > 1e-3


def test_sum_is_weighted(decoder_step, batch):
    decoder = models.Decoder()
    loss, *picked = run(decoder_step(decoder=decoder, reduction="sum"))
    torch.testing.assert_close(loss, reference(decoder, batch, *picked))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_candidates(reduction, decoder_step, batch):
    batch["labels"].fill_(-100)
    captured = decoder_step(reduction=reduction)
    loss, _, keep, _ = run(captured)
    assert loss.item() == 0.0 and not keep.any()


def test_half_precision_sum_does_not_overflow():
    decoder = models.Decoder()
    ids = torch.randint(0, models.VOCAB, (64, 60))

    def step(ids):
        logits = decoder(ids)
        return F.cross_entropy((logits * 200).half().flatten(0, 1), ids.flatten())

    loss, *_ = run(Captured(step, ids, options={"min_tokens_ratio": 0.9}))
    assert loss.dtype == torch.float16 and loss.isfinite()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_fused_is_the_same_number_without_logits(smoothing, decoder_step, batch):
    decoder = models.Decoder(bias=True)
    captured = decoder_step({"cross_entropy": "fused"}, decoder=decoder, label_smoothing=smoothing)
    loss, *picked = run(captured)
    count = (batch["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(loss, reference(decoder, batch, *picked, label_smoothing=smoothing) / count)
    operators = captured.operators()
    assert operators["linear_cross_entropy.default"] == 1 and not operators["cross_entropy"]


@pytest.mark.parametrize("decoder", [models.Decoder(bias=True), models.Decoder(tied=False)])
def test_dense_head_is_gone(decoder, decoder_step):
    captured = decoder_step(decoder=decoder)
    run(captured)
    shapes = [
        tuple(v.shape)
        for n in captured.gm.graph.nodes
        if isinstance(v := n.meta.get("example_value"), torch.Tensor) and n.op != "placeholder"
    ]
    assert (2, 16, models.VOCAB) not in shapes and (2, 4, models.VOCAB) in shapes
