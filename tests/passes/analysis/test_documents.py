"""What tells documents of packed sequences apart in a graph, and what does not."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from capture import Captured, execute
from models import HIDDEN, SEQ, VOCAB, make_batch
from torch import Tensor

from cggr_compile.passes.analysis.documents import documents, real_tokens
from cggr_compile.passes.facts import Candidates, Padding
from cggr_compile.passes.fx import Emitter

DOCUMENT = torch.tensor([[0] * 5 + [1] * 11, [0] * 7 + [1] * 9])
BEGINS = F.pad(DOCUMENT.diff() != 0, (1, 0))
POSITIONS = torch.stack([torch.cat([torch.arange(int(n)) for n in row.bincount()]) for row in DOCUMENT])
CAUSAL = torch.ones(SEQ, SEQ, dtype=torch.bool).tril()
SAME = DOCUMENT[:, :, None] == DOCUMENT[:, None]
OPTIONS = {"selection": "labels", "context": 3, "scoring": "random"}


class Rotary(models.Decoder):
    """Two blocks; queries and keys are turned by the cosine of ``places``; ``kinds`` are embedded like token types."""

    def forward(self, ids: Tensor, mask: Tensor | None = None, places: Any = None, kinds: Any = None) -> Tensor:
        x = self.wte(ids)
        if kinds is not None:
            x = x + self.wpe(kinds)
        turn = None if places is None else torch.cos(places.float()[..., None] * torch.linspace(1, 0.1, HIDDEN))
        for block in self.blocks[:2]:
            x = block(x if turn is None else x * turn, mask)
        return self.lm_head(self.ln_f(x))


def capture(attend: Any = models.attend_sdpa, **inputs: Tensor) -> Captured:
    model = Rotary(attend, fused=False)
    batch = make_batch()

    def step(ids: Tensor, labels: Tensor, **inputs: Tensor) -> Tensor:
        given = {"places": inputs.pop("position_ids")} if "position_ids" in inputs else {}
        inputs.pop("attention_mask", None)
        return F.cross_entropy(model(ids, **inputs, **given)[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))

    captured = Captured(step, batch["input_ids"], batch["labels"], options=OPTIONS, **inputs)
    captured.run("check_labels")
    return captured


def read(captured: Captured) -> tuple[Tensor | None, Any]:
    """Where documents begin, and what told it."""
    told = documents(captured.gm.graph, captured.ctx)
    emit = Emitter(captured.gm.graph, captured.ctx.fake_mode)
    with emit.before(captured.ctx[Candidates].anchor, "test"):
        starts = told.starts(emit)
    captured.gm.graph.lint()
    if starts is None:
        return None, told
    captured.check_shapes()
    return execute(captured, starts)[0], told


MASKS: dict[str, Tensor] = {
    "bool": (SAME & CAUSAL)[:, None],
    "added": torch.zeros(2, 1, SEQ, SEQ).masked_fill(~(SAME & CAUSAL)[:, None], torch.finfo(torch.float32).min),
    "for each head": (SAME & CAUSAL)[:, None].expand(-1, models.HEADS, -1, -1).contiguous(),
    "biased": torch.full((2, models.HEADS, SEQ, SEQ), -3.0).masked_fill(~(SAME & CAUSAL)[:, None], -torch.inf),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    starts, told = read(capture(mask=MASKS[name]))
    assert starts is not None and torch.equal(starts[:, 1:], BEGINS[:, 1:]) and len(told.hides) == 1


def test_a_mask_for_all_sequences() -> None:
    starts, _ = read(capture(mask=MASKS["bool"][0, 0]))
    assert starts is not None and starts.shape == (1, SEQ) and torch.equal(starts[0, 1:], BEGINS[0, 1:])


def test_keys_that_nobody_sees() -> None:
    """What follows padding begins anew; a column of queries hides as well."""
    real = torch.arange(SEQ) >= torch.tensor([[4], [0]])
    starts, _ = read(capture(mask=real[:, None, None, :]))
    assert starts is not None and torch.equal(starts[:, 1:], ~real[:, :-1])
    starts, _ = read(capture(mask=real[:, None, :, None]))
    assert starts is not None and torch.equal(starts[:, 1:], ~real[:, 1:])


@pytest.mark.parametrize("name", ["position_ids", "places"])
def test_positions(name: str) -> None:
    """By name, or because a rotary embedding is made of them."""
    starts, told = read(capture(**{name: POSITIONS}))
    assert starts is not None and torch.equal(starts[:, 1:], BEGINS[:, 1:]) and len(told.positions) == 1
    assert starts[:, 0].logical_not().all()


def test_either_tells() -> None:
    mask = torch.stack([CAUSAL, CAUSAL])
    mask[:, 3:, :3] = False
    starts, _ = read(capture(mask=mask[:, None], places=POSITIONS[:1]))
    wanted = BEGINS[:1].clone()
    wanted[:, 3] = True
    assert starts is not None and torch.equal(starts[:, 1:], wanted[:, 1:].expand(2, -1))


def masked_by_where(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is not None
    return torch.where(mask, q @ k.transpose(-2, -1), -1e9).softmax(-1) @ v


def masked_by_sum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is not None
    return (q @ k.transpose(-2, -1) + torch.where(mask, 0.0, -1e9)).softmax(-1) @ v


def folded_with_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Heads are folded into the sequences behind the mask."""
    assert mask is not None
    scores = (q.flatten(0, 1) @ k.flatten(0, 1).transpose(-2, -1)).view(2, -1, SEQ, SEQ).masked_fill(~mask, -1e9)
    return (scores.view(-1, SEQ, SEQ).softmax(-1) @ v.flatten(0, 1)).view_as(q)


@pytest.mark.parametrize("attend", [models.attend_softmax, masked_by_where, masked_by_sum, folded_with_heads])
def test_attention_by_hand(attend: Any) -> None:
    starts, _ = read(capture(attend, mask=MASKS["bool"]))
    assert starts is not None and torch.equal(starts[:, 1:], BEGINS[:, 1:])


def multiplied(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is not None
    return ((q @ k.transpose(-2, -1)) * mask.float()).softmax(-1) @ v


def folded_in_front(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The mask has one axis for sequences and heads as well."""
    assert mask is not None
    hidden = ~mask.expand(-1, q.shape[1], -1, -1).reshape(-1, SEQ, SEQ)
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).masked_fill(hidden, -1e9)
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view_as(q)


def added_to(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The products are added to the mask."""
    assert mask is not None
    hidden = torch.where(mask, 0.0, -1e9).expand(-1, q.shape[1], -1, -1).reshape(-1, SEQ, SEQ)
    scores = torch.baddbmm(hidden, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
    return torch.bmm(scores.softmax(-1), v.flatten(0, 1)).view_as(q)


@pytest.mark.parametrize(
    ("attend", "why"), [(multiplied, "'mul'"), (folded_in_front, "sequences and heads"), (added_to, "are added to")]
)
def test_what_cannot_be_read_is_told(attend: Any, why: str) -> None:
    starts, told = read(capture(attend, mask=MASKS["bool"]))
    assert starts is None and why in told.unread


def test_what_cannot_be_read_forbids_context() -> None:
    captured = capture(multiplied, mask=MASKS["bool"])
    assert "it may reach into another document: hand-written attention" in captured.run("select_rows").reason


def test_flex_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mask is read; what a score_mod hides is not, and that is told."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    monkeypatch.setattr(flex, "_validate_device", lambda query, key, value: None)
    documents = DOCUMENT

    def masked(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return flex.flex_attention(q, k, v, block_mask=mask)

    def scored(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        def score(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return torch.where(documents[b, i] == documents[b, j], score, -torch.inf)

        return flex.flex_attention(q, k, v, score_mod=score)

    def within(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (documents[b, i] == documents[b, j]) & (j <= i)

    mask = flex.create_block_mask(within, 2, None, SEQ, SEQ, device="cpu", BLOCK_SIZE=4)
    starts, told = read(capture(masked, mask=mask))
    assert starts is not None and torch.equal(starts[:, 1:], BEGINS[:, 1:]) and len(told.hides) == 1
    starts, told = read(capture(scored))
    assert starts is None and "score_mod" in told.unread


def test_nothing_tells() -> None:
    """Causal attention, token types, positions of another shape, and floats."""
    kinds = (torch.arange(SEQ) > 5).long().expand(2, -1)
    for inputs in ({}, {"kinds": kinds}, {"places": POSITIONS.float()}, {"places": POSITIONS[:1, :1]}):
        starts, told = read(capture(**inputs))
        assert starts is None and not told.positions and not told.unread


def test_one_attention_that_hides_nothing() -> None:
    """What is in one sequence to it is one document."""
    model = Rotary(fused=False)
    model.blocks[1].attend = lambda q, k, v, mask: models.attend_sdpa(q, k, v)
    batch = make_batch()

    def step(ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        return F.cross_entropy(model(ids, mask).flatten(0, 1), labels.flatten())

    captured = Captured(step, *batch.values(), MASKS["bool"], options=OPTIONS)
    captured.run("check_labels")
    assert read(captured)[0] is None


def test_padding_by_name() -> None:
    captured = capture(attention_mask=torch.ones(2, SEQ, dtype=torch.long))
    assert real_tokens(captured.gm.graph, captured.ctx) is None  # Dynamo leaves out what nothing reads
    model, batch = models.family("llama", num_hidden_layers=2), make_batch()
    padded = torch.ones(2, SEQ, dtype=torch.long)
    padded[0, :4] = 0
    captured = Captured(model, **batch, attention_mask=padded, options=OPTIONS)
    captured.run("check_labels")
    found = real_tokens(captured.gm.graph, captured.ctx)
    assert found is not None and found is captured.ctx[Padding].mask
