from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F
from capture import Captured, execute

from cggr_compile.causes import Cause
from cggr_compile.options import OptionError
from cggr_compile.passes.facts import Candidates, LayerStack, Padding


def test_shifted_labels_line_up(decoder_step, batch):
    captured = decoder_step()
    assert captured.run("align_targets").matched
    captured.check_shapes()
    target, valid = execute(captured, captured.ctx[Candidates].target, captured.ctx[Candidates].valid)
    expected = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    assert torch.equal(target, expected) and torch.equal(valid, expected != -100)


def test_sliced_at_both_ends(batch):
    decoder = models.Decoder()

    def step(ids, labels):
        return F.cross_entropy(decoder(ids)[:, 3:-2].reshape(-1, models.VOCAB), labels[:, 3:-2].reshape(-1))

    captured = Captured(step, *batch.values())
    captured.run("align_targets")
    (target,) = execute(captured, captured.ctx[Candidates].target)
    expected = torch.full_like(batch["labels"], -100)
    expected[:, 3:-2] = batch["labels"][:, 3:-2]
    assert torch.equal(target, expected)


def test_labels_that_are_written_late(batch):
    decoder = models.Decoder()

    def step(ids, labels):
        logits = decoder(ids)
        labels[:, :4].fill_(-100)
        return F.cross_entropy(logits[:, :-1].reshape(-1, models.VOCAB), labels[:, 1:].reshape(-1))

    result = Captured(step, *batch.values()).run("align_targets")
    assert result.cause is Cause.LATE_LABELS and "'fill' (" in result.reason


def test_targets_of_an_unknown_part_of_the_sequence(batch):
    decoder = models.Decoder()

    def step(ids, labels):
        half = ids.shape[1] // 2
        return F.cross_entropy(decoder(ids)[:, :half].reshape(-1, models.VOCAB), labels[:, :half].reshape(-1))

    torch._dynamo.mark_dynamic(batch["input_ids"], 1)
    torch._dynamo.mark_dynamic(batch["labels"], 1)
    assert Captured(step, *batch.values()).run("align_targets").cause is Cause.UNALIGNED_TARGETS


def test_padding_with_a_label_is_a_candidate(decoder_step, batch):
    captured = decoder_step()
    captured.run("find_stack")
    captured.ctx.add(Padding(captured.gm.graph.find_nodes(op="placeholder")[0]))
    captured.run("align_targets")
    (valid,) = execute(captured, captured.ctx[Candidates].valid)
    assert torch.equal(valid, F.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100)


def test_targets_move_in_front_of_the_router(decoder_step):
    captured = decoder_step()
    captured.run("align_targets")
    order = list(captured.gm.graph.nodes)
    stack = captured.ctx[LayerStack]
    assert order.index(captured.ctx[Candidates].valid) < order.index(stack.blocks[1].output)


def test_router_deeper_than_the_model(decoder_step):
    captured = decoder_step(options={"router_layers": 5})
    captured.run("find_stack")
    with pytest.raises(OptionError, match="router_layers must be at most 4"):
        captured.run("align_targets")
