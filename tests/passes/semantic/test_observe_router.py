from __future__ import annotations

import torch
from capture import execute

from cggr_compile.passes.facts import Candidates, ObservedRouter, RouterScores
from cggr_compile.pipeline import semantic_passes


def names(captured):
    return [graph_pass.name for graph_pass in semantic_passes(captured.ctx)]


def test_figures_beside_an_unmodified_loss(decoder_step):
    captured = decoder_step({"min_tokens_ratio": 1.0, "dynamic_threshold": True})
    captured.ctx.scheduled = True
    passes = semantic_passes(captured.ctx)
    (loss,) = captured.gm.graph.output_node().args[0]
    want = captured.gm(*captured.inputs)[0]
    assert captured.run("return_figures", passes).matched
    captured.check_shapes()
    outputs = captured.gm.graph.output_node().args[0]
    assert outputs == (loss, captured.ctx[ObservedRouter].stats)
    router, valid = captured.ctx.get(RouterScores), captured.ctx[Candidates].valid
    got, stats, valid, top1 = execute(captured, *outputs, valid, router.top1)
    assert torch.equal(got, want)
    assert stats[0] == stats[1] == valid.sum()
    torch.testing.assert_close(stats[2], top1[valid].mean())


def test_only_where_the_schedule_asks_for_it(decoder_step):
    captured = decoder_step({"min_tokens_ratio": 1.0, "dynamic_threshold": True})
    assert "observe_router" not in names(captured), "one ratio only"
    captured.ctx.scheduled = True
    assert names(captured)[-4:] == ["align_targets", "insert_router", "observe_router", "return_figures"]
    captured = decoder_step({"min_tokens_ratio": 0.5, "dynamic_threshold": True})
    captured.ctx.scheduled = True
    assert "observe_router" not in names(captured), "the selection returns the figures"
