from __future__ import annotations

import pytest
import torch
from capture import execute
from reference import candidates, shift

from cggr_compile.passes.facts import Candidates, RouterScores, Selection

SELECTIONS = [
    {"scoring": "random"},
    {"selection": "random"},
    {"selection": "topk", "scoring": "entropy"},
    {"selection": "stratified", "num_strata": 3},
    {"selection": "labels", "context": 0},
    {},
]


@pytest.mark.parametrize("options", SELECTIONS, ids=str)
@pytest.mark.parametrize("ratio", [0.25, 0.3, 0.9])
def test_rows(options, ratio, decoder_step):
    captured = decoder_step({**options, "min_tokens_ratio": ratio})
    assert captured.run("return_figures").matched
    captured.check_shapes()
    selection = captured.ctx[Selection]
    slots = {0.25: 4, 0.3: 5, 0.9: 15}[ratio]
    assert selection.rows.meta["example_value"].shape == (2, slots)
    outputs = captured.gm.graph.output_node().args[0]
    weights, public, stats = outputs[-3:]
    assert stats is selection.stats and weights is selection.weights and len(outputs) == 4
    rows, keep, weights, public, stats, valid = execute(
        captured, selection.rows, selection.keep, weights, public, stats, captured.ctx[Candidates].valid
    )
    assert torch.equal(public, torch.where(keep, rows, -1))
    assert valid.gather(1, rows)[keep].all()
    assert torch.equal(keep.sum(1), valid.sum(1).clamp(max=slots))
    assert stats[0] == keep.sum() and stats[1] == valid.sum()
    assert stats[2:].isnan().all() == (captured.ctx.get(RouterScores) is None)
    assert (weights[keep] >= 1).all() and (weights[~keep] == 0).all()


@pytest.mark.parametrize(
    ("options", "slots"),
    [
        ({"selection": "labels", "max_selected": 3}, 3),
        ({"selection": "labels", "max_selected": 99}, 16),
        ({"selection": "labels", "max_selected": 0.4}, 7),
        ({"scope": "batch"}, 6),
        ({"scope": "batch", "selection": "random", "max_selected": 3}, 3),
        ({"scope": "batch", "selection": "topk", "min_tokens_ratio": 0.9}, 16),
        ({"selection": "sequence_aware"}, 6),
        ({"selection": "spans", "span": 2}, 4),
        ({"selection": "spans", "scope": "batch"}, 6),
        ({"selection": "sequence_aware", "min_tokens_per_sequence": 5, "max_selected": 4}, 4),
    ],
    ids=str,
)
def test_slots(options, slots, decoder_step, batch):
    captured = decoder_step(options)
    assert captured.run("select_rows").matched
    captured.check_shapes()
    selection = captured.ctx[Selection]
    rows, keep, weights = execute(captured, selection.rows, selection.keep, selection.weights)
    assert rows.shape == keep.shape == weights.shape == (2, slots)
    valid = candidates(shift(batch["labels"]))
    if options.get("selection") == "labels":
        assert torch.equal(keep.sum(1), valid.sum(1).clamp(max=slots))
        torch.testing.assert_close(weights.sum(1), valid.sum(1).float())


def test_state_is_the_last_input(decoder_step):
    captured = decoder_step()
    captured.run("select_rows")
    last = captured.gm.graph.find_nodes(op="placeholder")[-1]
    assert last is captured.ctx[Selection].state and str(last) == "cggr_state"
    assert last._dynamo_source is None


@pytest.mark.parametrize("selection", ["topk", "fixed_quota", "sequence_aware"])
def test_unweighted_selections_are_told(selection, decoder_step):
    captured = decoder_step({"selection": selection})
    captured.run("select_rows")
    (notice,) = captured.ctx.notices
    assert selection in notice and "biased" in notice and "6.47" in notice


def test_weighted_selections_are_not(decoder_step):
    for selection in ("importance", "random", "stratified", "spans", "labels"):
        captured = decoder_step({"selection": selection})
        captured.run("select_rows")
        assert not captured.ctx.notices
