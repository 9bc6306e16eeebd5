from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F
from capture import Captured, execute

from cggr_compile.options import OptionError


def test_shifted_labels_line_up(decoder_step, batch):
    captured = decoder_step()
    assert captured.run("align_targets").matched
    captured.check_shapes()
    target, valid = execute(captured, captured.ctx.candidates.target, captured.ctx.candidates.valid)
    expected = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    assert torch.equal(target, expected) and torch.equal(valid, expected != -100)


def test_sliced_at_both_ends(batch):
    decoder = models.Decoder()

    def step(ids, labels):
        return F.cross_entropy(decoder(ids)[:, 3:-2].reshape(-1, models.VOCAB), labels[:, 3:-2].reshape(-1))

    captured = Captured(step, *batch.values())
    captured.run("align_targets")
    (target,) = execute(captured, captured.ctx.candidates.target)
    expected = torch.full_like(batch["labels"], -100)
    expected[:, 3:-2] = batch["labels"][:, 3:-2]
    assert torch.equal(target, expected)


def test_padding_with_a_label_is_a_candidate(decoder_step, batch):
    captured = decoder_step()
    captured.run("find_stack")
    captured.ctx.padding = captured.gm.graph.find_nodes(op="placeholder")[0]
    captured.run("align_targets")
    (valid,) = execute(captured, captured.ctx.candidates.valid)
    assert torch.equal(valid, F.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100)


def test_targets_move_in_front_of_the_router(decoder_step):
    captured = decoder_step()
    captured.run("align_targets")
    order = list(captured.gm.graph.nodes)
    stack = captured.ctx.stack
    assert order.index(captured.ctx.candidates.valid) < order.index(stack.blocks[1].output)


def test_router_deeper_than_the_model(decoder_step):
    captured = decoder_step(options={"router_layers": 5})
    captured.run("find_stack")
    with pytest.raises(OptionError, match="router_layers must be at most 4"):
        captured.run("align_targets")
