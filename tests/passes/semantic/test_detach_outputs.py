from __future__ import annotations

import models
import torch.nn.functional as F
from capture import Captured


def run(batch, outputs, **options):
    decoder = models.Decoder()

    def step(ids, labels):
        logits = decoder(ids)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return outputs(loss, logits, decoder)

    captured = Captured(step, *batch.values(), options=options)
    result = captured.run("detach_outputs")
    captured.check_shapes()
    results = captured.gm.graph.output_node().args[0]
    return result, [n.meta["example_value"] for n in results]


def test_loss_alone(batch):
    result, values = run(batch, lambda loss, logits, _: loss)
    assert not result.matched and values[0].requires_grad


def test_drop(batch):
    result, values = run(batch, lambda loss, logits, _: (loss, logits))
    assert result.matched and values[1].shape == (2, 0, models.VOCAB) and not values[1].requires_grad
    assert values[0].requires_grad


def test_drop_of_a_flat_view(batch):
    _, values = run(batch, lambda loss, logits, _: (loss, logits.view(-1, models.VOCAB)))
    assert values[1].shape == (0, models.VOCAB)


def test_detach(batch):
    _, values = run(batch, lambda loss, logits, _: (loss, logits), logits="detach")
    assert values[1].shape == (2, 16, models.VOCAB) and not values[1].requires_grad


def test_scalars_keep_their_gradient_and_metrics_stay(batch):
    _, values = run(batch, lambda loss, logits, d: (loss, (d.wte.weight**2).mean(), logits.argmax(-1)))
    assert [v.requires_grad for v in values[:3]] == [True, True, False]
    assert values[2].shape == (2, 16)
