from __future__ import annotations

import pytest
import torch
from capture import execute


@pytest.mark.parametrize("options", [{"scoring": "random"}, {"selection": "topk", "scoring": "entropy"}])
@pytest.mark.parametrize("ratio", [0.25, 0.3, 0.9])
def test_rows(options, ratio, decoder_step):
    captured = decoder_step({**options, "min_tokens_ratio": ratio})
    assert captured.run("select_rows").matched
    captured.check_shapes()
    selection = captured.ctx.selection
    slots = {0.25: 4, 0.3: 5, 0.9: 15}[ratio]
    assert selection.rows.meta["example_value"].shape == (2, slots)
    outputs = captured.gm.graph.output_node().args[0]
    public, stats = outputs[-2:]
    assert stats is selection.stats and len(outputs) == 3
    rows, keep, public, stats, valid = execute(
        captured, selection.rows, selection.keep, public, stats, captured.ctx.candidates.valid
    )
    assert torch.equal(public, torch.where(keep, rows, -1))
    assert valid.gather(1, rows)[keep].all()
    assert stats[0] == keep.sum() and stats[1] == valid.sum()
    assert stats[2:].isnan().all() == (captured.ctx.router is None)


def test_state_is_the_last_input(decoder_step):
    captured = decoder_step()
    captured.run("select_rows")
    last = captured.gm.graph.find_nodes(op="placeholder")[-1]
    assert last is captured.ctx.selection.state and str(last) == "cggr_state"
    assert last._dynamo_source is None
