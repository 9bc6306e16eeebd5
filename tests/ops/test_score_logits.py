"""``score_logits`` is ``score`` of logits that exist already."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.test_score import check, expected, make_case
from torch.library import opcheck

from cggr_compile.ops.score_logits import score_logits


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 9), st.integers(1, 300), st.sampled_from([0.1, 1.0, 30.0]))
def test_equals_softmax(rows, vocab, sharp):
    torch.manual_seed(rows * 1000 + vocab)
    case = make_case(rows, vocab, 8, sharp=sharp)
    hidden, weight, _, labels, _, _ = case
    check(score_logits(hidden @ weight.T, labels), expected(*case), 1e-4)


def test_shapes_ties_and_impossible_tokens():
    logits = torch.tensor([[2.0, 2.0, 1.0], [3.0, -torch.inf, -torch.inf], [0.0, 1.0, -torch.inf]])
    lse, entropy, top1, top2, label = score_logits(logits.view(1, 3, 3), torch.tensor([[0, 0, -100]]))
    assert lse.shape == (1, 3)
    assert top1[0, 0] == top2[0, 0]
    assert (entropy[0, 1], top1[0, 1], top2[0, 1], label[0, 1]) == (0, 1, 0, 0)
    assert label[0, 2] == 0 and entropy.isfinite().all()


def test_opcheck():
    outcome = opcheck(torch.ops.cggr.score_logits.default, (torch.randn(2, 3, 7), torch.randint(0, 7, (2, 3))))
    assert set(outcome.values()) == {"SUCCESS"}
