from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from capture import Captured
from models import SEQ, make_batch, slow_but
from token_losses import Model

from cggr_compile.passes.analysis.documents import documents
from cggr_compile.passes.facts import Candidates, Forward, LayerStack, LossSite
from cggr_compile.passes.nodes import op_name

MODEL = Model()
IDS = make_batch(ignored=False)["input_ids"]
OTHER = IDS.flip(1)[:, :12]


def loss(logits, ids):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def two(ids, other):
    return loss(MODEL(ids), ids) + loss(MODEL(other), other)


def three(ids, other):
    return two(ids, other) + loss(MODEL(other[:, :5]), other[:, :5])


def one(ids, other):
    return loss(MODEL(ids), ids)


def reference_without_gradient(ids, other):
    with torch.no_grad():
        constant = loss(MODEL(other), other)
    return F.relu(loss(MODEL(ids), ids) - constant)


def second_head(ids, other):
    hidden = MODEL.hidden(ids)
    return loss(MODEL.lm_head(hidden), ids) + loss(MODEL.second(hidden + MODEL.layer(hidden)), ids)


def chunked_head(ids, other):
    return sum(loss(MODEL.lm_head(piece), ids[:, :8]) for piece in MODEL.hidden(ids).split(8, dim=1))


def one_cross_entropy(ids, other):
    logits = torch.cat([MODEL(ids).flatten(0, 1), MODEL(other).flatten(0, 1)])
    return F.cross_entropy(logits, torch.cat([ids.flatten(), other.flatten()]))


COUNTS = {
    two: 2,
    three: 3,
    one: 1,
    reference_without_gradient: 1,
    second_head: 1,
    chunked_head: 1,
    one_cross_entropy: 1,
}


@pytest.mark.parametrize("step", slow_but([two, reference_without_gradient, second_head, one_cross_entropy], COUNTS))
def test_counts(step):
    captured = Captured(step, IDS, OTHER)
    result = captured.run("find_forwards")
    assert len(captured.ctx.forwards) == COUNTS[step] and result.matched == (COUNTS[step] > 1)
    found = captured.ctx.every(Forward)
    assert len(found) == (COUNTS[step] if result.matched else 0)
    for forward in found:
        assert {op_name(node) for node in forward.embeddings} == {"embedding"}
        assert forward.embeddings.isdisjoint(forward.others)


def test_each_has_facts_of_its_own():
    captured = Captured(two, IDS, OTHER)
    captured.run("align_targets")
    ctx = captured.ctx
    sites, stacks = ctx.every(LossSite), ctx.every(LayerStack)
    assert len({site.loss for site in sites}) == len({stack.source for stack in stacks}) == 2
    shapes = [found.valid.meta["example_value"].shape for found in ctx.every(Candidates)]
    assert shapes == [(2, SEQ), (2, 12)]
    assert ctx.get(LossSite) is None  # not the graph's
    with ctx.of(1):
        assert ctx[LossSite] is sites[1] and ctx.forward == 1
    assert captured.results["find_stack"].reason == "in each of 2 forwards: 1 blocks, alike"


class Rotating(Model):
    """Positions in documents are given."""

    def forward(self, ids, position_ids):
        return self.lm_head(self.ln_f(self.blocks[0](self.wte(ids) + self.wpe(position_ids))))


def test_documents_of_another_forward_are_none_of_its_own():
    """Inputs of the same shape and name."""
    model = Rotating()

    def step(ids, first, second):
        return sum(loss(model(ids, each["position_ids"]), ids) for each in (first, second))

    positions = torch.arange(SEQ).expand(2, -1)
    captured = Captured(step, IDS, {"position_ids": positions + 0}, {"position_ids": positions % 8})
    captured.run("choose_selection")
    names = []
    for forward in captured.ctx.forwards:
        with captured.ctx.of(forward):
            names.append([str(node) for node in documents(captured.gm.graph, captured.ctx).positions])
    assert [len(each) for each in names] == [1, 1] and "first" in names[0][0] and "second" in names[1][0], names
