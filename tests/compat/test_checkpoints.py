"""Checkpoints, told by their hooks and numbers."""

from __future__ import annotations

import torch

from cggr_compile import compat


def test_numbers_grow():
    assert compat.next_checkpoint_id() < compat.next_checkpoint_id()


def test_checkpoints_are_known_by_their_hooks():
    seen = []

    def body(x):
        seen.append([compat.checkpoint_of(pack) for pack in compat.saved_tensors_packers()])
        return x.sin()

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        out = torch.utils.checkpoint.checkpoint(body, torch.ones(2, requires_grad=True), use_reentrant=False)
    out.sum().backward()
    (forward, other), (again, *_) = seen
    assert other is None and forward[0] is again[0] and (forward[1], again[1]) == (False, True)
