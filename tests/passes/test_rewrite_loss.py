from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F
from capture import Captured, execute


def run(captured):
    assert captured.run("rewrite_loss").matched
    captured.check_shapes()
    loss = captured.gm.graph.output_node().args[0][0]
    return execute(captured, loss, captured.ctx.selection.rows, captured.ctx.selection.keep)


def reference(decoder, batch, rows, keep, **kwargs):
    ids, labels = batch.values()
    target = F.pad(labels[:, 1:], (0, 1), value=-100)
    logits = decoder(ids).gather(1, rows[:, :, None].expand(-1, -1, models.VOCAB))
    return F.cross_entropy(logits[keep].float(), target.gather(1, rows)[keep], **kwargs)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mean(smoothing, decoder_step, batch):
    decoder = models.Decoder()
    loss, rows, keep = run(decoder_step(decoder=decoder, label_smoothing=smoothing))
    expected = reference(decoder, batch, rows, keep, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)
    assert (loss - F.cross_entropy(decoder(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())).abs() > 1e-3


def test_sum_estimates_the_full_sum(decoder_step, batch):
    decoder = models.Decoder()
    loss, rows, keep = run(decoder_step(decoder=decoder, reduction="sum"))
    candidates = (F.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100).sum()
    torch.testing.assert_close(loss, reference(decoder, batch, rows, keep) * candidates)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_candidates(reduction, decoder_step, batch):
    batch["labels"].fill_(-100)
    captured = decoder_step(reduction=reduction)
    loss, _, keep = run(captured)
    assert loss.item() == 0.0 and not keep.any()


def test_half_precision_sum_does_not_overflow():
    decoder = models.Decoder()
    ids = torch.randint(0, models.VOCAB, (64, 60))

    def step(ids):
        logits = decoder(ids)
        return F.cross_entropy((logits * 200).half().flatten(0, 1), ids.flatten())

    loss, *_ = run(Captured(step, ids, options={"min_tokens_ratio": 0.9}))
    assert loss.dtype == torch.float16 and loss.isfinite()


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
