"""The last block's part that only the loss reads runs on rows: where it may, where it must not, and that it does."""

from __future__ import annotations

import models
import pytest
import torch.nn.functional as F
from capture import Captured
from reference import assert_same, backward, hf_reference
from torch import nn
from training import picks, small

import cggr_compile
from cggr_compile.passes.facts import RowTail
from cggr_compile.passes.nodes import op_name, shape_of

ROWS = (2, 4)  # a quarter of 16 positions


def record(model):
    return cggr_compile.runtime(model).reports[0].record("shorten_last_block")


def products(captured):
    """Leading sizes of every product with a weight, in the rewritten graph."""
    captured.gm.graph.eliminate_dead_code()
    return [shape_of(n)[:2] for n in captured.gm.graph.nodes if op_name(n) == "linear"]


def test_products_behind_the_attention_run_on_rows(decoder_step):
    captured = decoder_step({"scoring": "random", "selection": "random"})
    assert captured.run("shorten_last_block").matched
    captured.run("detach_outputs")
    captured.check_shapes()
    whole = products(captured)
    # output projection, both products of the MLP, head
    assert whole[-4:] == [ROWS] * 4 and ROWS not in whole[:-4]


def test_twice_is_once(decoder_step):
    captured = decoder_step()
    captured.run("shorten_last_block")
    before = captured.ctx[RowTail]
    del captured.results["shorten_last_block"]
    captured.run("shorten_last_block")
    assert captured.ctx[RowTail] == before


@pytest.mark.parametrize(
    ("name", "kv_gradient"),
    [
        *(("mixtral", "stop"), ("gpt2", "project"), ("phi", "stop"), ("phi", "project")),
        pytest.param("mixtral", "project", marks=pytest.mark.slow),
        pytest.param("gpt2", "stop", marks=pytest.mark.slow),
    ],
)
def test_gradients(name, kv_gradient):
    """Experts, addmm with flattened tokens, and an MLP beside the attention."""
    model, batch = models.compiled(small(name), kv_gradient=kv_gradient), models.make_batch()
    run = backward(model, model(**batch).loss)
    assert record(model).matched, record(model).reason
    assert_same(run, hf_reference(model, batch, picks(model), kv_gradient=kv_gradient))


def test_control_the_wrong_rows_are_seen(monkeypatch):
    """Of one entry the rows of the next position: the check above fails."""
    from cggr_compile.passes.semantic import rewrite_loss

    gather = rewrite_loss.gather_rows

    def shifted(emit, source, *others):
        taken = gather(emit, source, *others)
        if "reshape" not in str(source):
            return taken
        with emit.before(taken.next, "test"):
            return emit.method("roll", taken, 1, 1)

    monkeypatch.setattr(rewrite_loss, "gather_rows", shifted)
    model, batch = models.compiled(small()), models.make_batch()
    run = backward(model, model(**batch).loss)
    with pytest.raises(AssertionError, match="differ"):
        assert_same(run, hf_reference(model, batch, picks(model)))


def test_rows_are_known_too_late(decoder_step):
    result = decoder_step({"router_layers": "full"}).run("shorten_last_block")
    assert not result.matched and "the rows are selected behind it" in result.reason


class Reader(nn.Module):
    """Reads something of the last block besides its loss."""

    def __init__(self, what):
        super().__init__()
        self.decoder, self.what = models.Decoder(), what

    def forward(self, ids, labels):
        logits = self.decoder(ids)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return (loss, logits.argmax(-1)) if self.what == "metric" else (loss, logits)


@pytest.mark.parametrize(
    ("what", "logits", "matched"), [("metric", "drop", False), ("logits", "detach", False), ("logits", "drop", True)]
)
def test_what_else_reads_it(batch, what, logits, matched):
    captured = Captured(Reader(what), batch["input_ids"], batch["labels"], options={"logits": logits})
    result = captured.run("shorten_last_block")
    assert result.matched is matched, result.reason
    if what == "metric":
        assert "argmax reads" in result.reason


def test_random_numbers_are_drawn_for_every_position(batch):
    """Dropout of some rows would not be the dropout of all."""
    decoder = models.Decoder()
    decoder.blocks[-1].down.register_forward_hook(lambda module, args, out: F.dropout(out, 0.5))
    loss = lambda ids: F.cross_entropy(decoder(ids).flatten(0, 1), ids.flatten())  # noqa: E731
    captured = Captured(loss, batch["input_ids"])
    captured.run("align_targets")
    assert not captured.run("shorten_last_block").matched


def test_a_kept_hidden_state_keeps_its_block(batch):
    decoder, kept = models.Decoder(), []
    decoder.blocks[-1].register_forward_hook(lambda module, args, out: kept.append(out))

    def step(ids, labels):
        loss = F.cross_entropy(decoder(ids).flatten(0, 1), labels.flatten())
        return loss, kept.pop()

    result = Captured(step, batch["input_ids"], batch["labels"]).run("shorten_last_block")
    assert not result.matched and "the caller reads" in result.reason
