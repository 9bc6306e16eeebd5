"""``selection="auto"``: what the first batch decides, and the slots that it gets."""

from __future__ import annotations

import pytest
import torch

from cggr_compile.options import Options
from cggr_compile.passes.facts import Slots
from cggr_compile.passes.semantic.choose_selection import DOUBLINGS, rounded_up

FEW = 6  # labels at the end of each sequence of 16


@pytest.fixture
def few(batch):
    """Labels on the last positions, one sequence with fewer."""
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :-FEW] = -100
    batch["labels"][0, :-2] = -100
    return batch


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("options", "slots"),
    [
        ({"context": 3}, Slots(6, 12, DOUBLINGS)),  # 6 labels, 9 rows
        ({"context": 3, "max_selected": 8}, Slots(6, 8)),
        ({"context": 3, "max_selected": 0.25}, Slots(4, 4)),
        ({"context": 0}, Slots(6, 6, DOUBLINGS)),
        ({"gradient": "exact"}, Slots(6, 6, DOUBLINGS)),
        ({}, Slots(6, 16)),  # 128 positions before each
    ],
)
def test_few_labels(decoder_step, options, slots):
    captured = decoder_step(options)
    result = captured.run("choose_selection")
    assert result.matched and result.reason.startswith("labels: 25.0% of the first batch's positions have a label")
    assert captured.ctx[Slots] == slots
    assert captured.ctx.options.selection == "labels" and not captured.ctx.options.needs_router
    (notice,) = captured.ctx.notices
    assert notice.startswith("selection='auto' is 'labels' here") and f"{slots.loss} of 16 slots" in notice


@pytest.mark.usefixtures("few")
def test_slots_are_doubled(decoder_step):
    captured = decoder_step({"context": 1})
    captured.ctx.growth = 1
    captured.run("choose_selection")
    assert captured.ctx[Slots] == Slots(12, 16)  # 2 * 6, 2 * 8


def test_many_labels(decoder_step):
    captured = decoder_step()
    assert captured.run("choose_selection").reason.startswith("importance: ")
    assert captured.ctx.options.selection == "importance" and captured.ctx.get(Slots) is None


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("options", [{"scope": "batch"}, {"dynamic_threshold": True}])
def test_what_only_importance_can_do(decoder_step, options):
    captured = decoder_step(options)
    assert "needs scores" in captured.run("choose_selection").reason
    assert captured.ctx.options.selection == "importance"


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("selection", ["importance", "labels"])
def test_what_is_asked_for_is_obeyed(decoder_step, selection):
    captured = decoder_step({"selection": selection})
    assert not captured.run("choose_selection").matched
    assert captured.ctx.options.selection == selection and not captured.ctx.notices


def test_no_label_at_all(decoder_step, batch):
    batch["labels"].fill_(-100)
    assert "no position of the first batch has a label" in decoder_step().run("choose_selection").reason


def test_labels_that_only_the_model_knows(decoder_step, few):
    captured = decoder_step()
    captured.inputs[:] = [x.to("meta") if x is few["labels"] else x for x in captured.inputs]
    captured.ctx.example_inputs = captured.inputs
    assert "is not known" in captured.run("choose_selection").reason


def test_it_is_the_default():
    assert Options().selection == "auto"


def test_sizes_of_a_ladder():
    sizes = sorted({rounded_up(number, 2048) for number in range(1, 2049)})
    assert sizes == [32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert all(rounded_up(number, 100) >= number for number in range(1, 101))
    assert rounded_up(16, 16) == 16 and rounded_up(99, 100) == 100
    assert torch.tensor([rounded_up(n, 64) for n in range(1, 65)]).diff().min() >= 0
