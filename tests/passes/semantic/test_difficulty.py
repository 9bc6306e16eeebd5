"""The option ``scoring``: what it adds to the graph, and what it refuses."""

from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F
from capture import Captured, execute
from reference import difficulty

from cggr_compile.options import OptionError
from cggr_compile.passes.facts import Candidates, RouterScores


def squared(lse, entropy, top1, top2, label_logprob):
    return torch.where(top1 > 0.5, label_logprob**2, entropy.clamp(min=0.1) * top2) + 0.0 * lse


def writes(lse, entropy, top1, top2, label_logprob):
    return entropy.add_(1)


def branches(lse, entropy, top1, top2, label_logprob):
    return entropy if entropy.mean() > 1 else top1


CONSTANT = torch.ones(2, 16)
REFUSED = {
    "two arguments": (lambda a, b: a, r"must take \(logsumexp, entropy"),
    "a number": (lambda *s: 3.0, "torch.fx|must take"),
    "writes": (writes, "test_difficulty.writes must not write"),
    "branches": (branches, "cannot be traced"),
    "shape": (lambda a, b, c, d, e: a.mean(), r"shaped like its arguments, got torch.float32 of shape \[\]"),
    "type": (lambda a, b, c, d, e: a > b, "got torch.bool"),
    "tuple": (lambda a, b, c, d, e: (a, b), "must return a floating-point tensor"),
    "nothing": (lambda a, b, c, d, e: None, "must return a floating-point tensor"),
    "a tensor of its own": (lambda a, b, c, d, e: a * CONSTANT, "from its arguments alone"),
    "fails": (lambda a, b, c, d, e: a.reshape(7, 7), "fails at reshape"),
}


@pytest.mark.parametrize("scoring", ["el2n", squared])
@pytest.mark.parametrize("layers", [1, "full"])
def test_values(scoring, layers, decoder_step, batch):
    decoder = models.Decoder()
    captured = decoder_step({"scoring": scoring, "router_layers": layers}, decoder=decoder)
    assert captured.run("insert_router").matched
    captured.check_shapes()
    got, valid = execute(captured, captured.ctx.get(RouterScores).difficulty, captured.ctx[Candidates].valid)
    blocks = decoder.blocks
    decoder.blocks = blocks if layers == "full" else blocks[:1]
    logits = decoder(batch["input_ids"]).double()
    decoder.blocks = blocks
    target = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    p = logits.softmax(-1)
    if scoring == "el2n":
        expected = (p - F.one_hot(target.clamp(min=0), models.VOCAB)).norm(dim=-1)
    else:
        top = p.topk(2, -1).values
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        expected = squared(0.0, entropy, top[..., 0], top[..., 1], -difficulty(logits, target, "loss"))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[valid].double(), expected[valid], atol=1e-5, rtol=1e-4)


def test_el2n_with_a_softcap():
    """Twice the capped logits, not the cap of twice the logits."""
    decoder, batch = models.Decoder(bias=True), models.make_batch()

    def step(ids, labels):
        logits = torch.tanh(decoder(ids) * 0.7 / 2.0) * 2.0
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    captured = Captured(step, *batch.values(), options={"scoring": "el2n", "router_layers": "full"})
    assert captured.run("insert_router").matched
    got, valid = execute(captured, captured.ctx.get(RouterScores).difficulty, captured.ctx[Candidates].valid)
    p = (torch.tanh(decoder(batch["input_ids"]) * 0.7 / 2.0) * 2.0).softmax(-1)
    expected = (p - F.one_hot(batch["labels"].clamp(min=0), models.VOCAB)).norm(dim=-1)
    torch.testing.assert_close(got[valid], expected[valid], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_functions(name, decoder_step):
    function, message = REFUSED[name]
    captured = decoder_step({"scoring": function})
    with pytest.raises(OptionError, match=f"scoring: .*({message})"):
        captured.run("insert_router")


def excess(reference_loss):
    decoder, batch = models.Decoder(), models.make_batch()

    def step(ids, labels, reference_loss):
        labels = torch.ops.cggr.carry(labels, reference_loss)
        return F.cross_entropy(decoder(ids).flatten(0, 1), labels.flatten())

    arguments = *batch.values(), reference_loss
    return Captured(step, *arguments, options={"scoring": "excess", "router_layers": "full"}), decoder, batch


def test_excess():
    reference_loss = torch.rand(2, 16) * 5
    captured, decoder, batch = excess(reference_loss)
    assert captured.run("insert_router").matched
    got, valid = execute(captured, captured.ctx.get(RouterScores).difficulty, captured.ctx[Candidates].valid)
    expected = difficulty(decoder(batch["input_ids"]), batch["labels"], "loss") - reference_loss
    torch.testing.assert_close(got[valid], expected[valid].float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bad", [torch.rand(2, 15), torch.ones(2, 16, dtype=torch.long), torch.rand(32)])
def test_reference_loss_of_another_shape_or_type(bad):
    captured, *_ = excess(bad)
    with pytest.raises(OptionError, match="reference_loss must be floating-point of shape"):
        captured.run("insert_router")


def test_no_reference_loss(decoder_step):
    captured = decoder_step({"scoring": "excess"})
    with pytest.raises(OptionError, match=r"named reference_loss, found 0.*with_reference_loss"):
        captured.run("insert_router")
