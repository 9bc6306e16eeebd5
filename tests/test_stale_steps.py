from __future__ import annotations

import gc

import pytest
import torch

from cggr_compile.stale_steps import StaleSteps


def make(kind=torch.optim.SGD, **options):
    p = torch.nn.Parameter(torch.ones(3, 4))
    p.grad = torch.ones(3, 4)
    return p, kind([p], lr=0.1, **options)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": False}])
def test_counts_steps_but_not_the_own(options):
    p, optimizer = make(torch.optim.AdamW, **options)
    stale = StaleSteps()
    optimizer.step()
    assert stale.count == 0  # not before begin
    optimizer.zero_grad()
    stale.begin([p])
    p.grad = torch.ones(3, 4)
    for count in (1, 2):
        optimizer.step()
        assert stale.count == count
    for _ in range(2):  # micro-batches
        stale.seen()
        assert stale.count == 0
    optimizer.step()
    assert stale.count == 0
    optimizer.step()
    assert stale.count == 1
    stale.end()
    optimizer.step()
    assert stale.count == 0


def test_a_step_that_is_due_when_it_begins():
    """Given up between backward and step: that step belongs to a forward that was seen."""
    p, optimizer = make()
    stale = StaleSteps()
    stale.begin([p])
    optimizer.step()
    assert stale.count == 0


def test_optimizers_of_others_and_two_of_one_model():
    (p, first), (q, second), (_, other) = make(), make(), make()
    p.grad = q.grad = None
    stale = StaleSteps()
    stale.begin([p, q])
    for optimizer in (other, first, second):
        optimizer.step()
    assert stale.count == 1


def test_no_hook_is_left_behind():
    from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

    before = len(hooks)
    stale = StaleSteps()
    stale.begin([make()[0]])
    stale.begin([make()[0]])
    assert len(hooks) == before + 1
    del stale
    gc.collect()
    assert len(hooks) == before
