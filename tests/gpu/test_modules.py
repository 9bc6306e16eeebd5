"""The modules on an accelerator: the CPU's numbers, and no host synchronisation."""

from __future__ import annotations

import pytest
import torch
from modules import zoo

from cggr_compile import CGGRLoss, CGGRScorer, TruncatedRouter

SELECTIONS = ("topk", "stratified", "sequence_aware", "fixed_quota")


@pytest.mark.filterwarnings("ignore:selection=")
@pytest.mark.parametrize("device", ["cpu", "cuda"])  # of the criterion: many leave theirs on the CPU
@pytest.mark.parametrize("selection", SELECTIONS)
def test_loss(selection, device):
    loss, twin = CGGRLoss(selection=selection, warmup_steps=4).to(device), CGGRLoss(selection=selection, warmup_steps=4)
    logits, targets = torch.randn(2, 16, 50), torch.randint(0, 50, (2, 16))
    here = logits.cuda().requires_grad_()
    there = targets.cuda()
    for _ in range(3):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            value = loss(here, there)
            value.backward()
            loss.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        # float32 exponentials and sums of two devices; a token more or less would be far outside
        torch.testing.assert_close(value.cpu(), twin(logits, targets), atol=1e-5, rtol=1e-5)
        twin.step()
        got, want = loss.get_metrics(), twin.get_metrics()
        words = {name for name, value in want.items() if isinstance(value, str)}  # which approx refuses
        assert {name: got[name] for name in words} == {name: want[name] for name in words}
        assert {n: v for n, v in got.items() if n not in words} == pytest.approx(
            {n: v for n, v in want.items() if n not in words}, rel=1e-4
        )


def test_scorer():
    model = zoo.style("llama").eval()
    ids = zoo.ids()
    want = CGGRScorer(TruncatedRouter(model, 2))(ids, targets=ids)
    model.cuda()
    scorer, ids = CGGRScorer(TruncatedRouter(model, 2)).cuda(), ids.cuda()
    scorer(ids, targets=ids)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = scorer(ids, targets=ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got[0].cpu(), want[0], atol=1e-3, rtol=1e-3)
    assert torch.equal(got[1].cpu(), want[1])
