from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cggr_compile.modules.selection import token_mask

SELECTIONS = ("topk", "fixed_quota", "sequence_aware", "stratified")


def mask_of(selection, difficulty, valid=None, ratio=0.25, *, step=0, num_strata=4, min_tokens_per_sequence=1):
    valid = torch.ones_like(difficulty, dtype=torch.bool) if valid is None else valid
    options = SimpleNamespace(num_strata=num_strata, min_tokens_per_sequence=min_tokens_per_sequence)
    return token_mask(selection, difficulty, valid, torch.tensor(ratio), torch.tensor(step), options)


def draw(batch, seq, seed, *, ties=False, share=0.7):
    generator = torch.Generator().manual_seed(seed)
    difficulty = torch.randn(batch, seq, generator=generator)
    valid = torch.rand(batch, seq, generator=generator) < share
    return (difficulty.round() if ties else difficulty), valid


CASES = st.tuples(
    st.integers(1, 4), st.integers(1, 12), st.integers(0, 999), st.sampled_from([0.01, 0.1, 0.3, 0.5, 0.9, 1.0])
)


@settings(max_examples=40, deadline=None)
@given(CASES, st.booleans(), st.integers(1, 6), st.integers(1, 3))
def test_counts_and_candidates(case, ties, num_strata, least):
    """As many as asked for, also among ties; never a token that is no candidate; 1.0 selects everything."""
    batch, seq, seed, ratio = case
    difficulty, valid = draw(batch, seq, seed, ties=ties)
    count, per_row = int(valid.sum()), valid.sum(1)
    wanted = min(math.ceil(round(ratio * count, 6)), count)
    masks = {
        name: mask_of(name, difficulty, valid, ratio, num_strata=num_strata, min_tokens_per_sequence=least)
        for name in SELECTIONS
    }
    for name, mask in masks.items():
        assert mask.shape == valid.shape and mask.dtype == torch.bool, name
        assert not (mask & ~valid).any(), name
        assert bool(mask.any()) == bool(valid.any()), name
        if ratio == 1.0:
            assert torch.equal(mask, valid), name
    for row, mask in enumerate(masks["topk"]):
        assert mask.sum() == math.ceil(round(ratio * int(per_row[row]), 6))
    assert torch.equal(masks["topk"], masks["fixed_quota"])
    assert (masks["sequence_aware"].sum(1) >= per_row.clamp(max=least)).all()
    assert masks["sequence_aware"].sum() >= wanted
    assert wanted <= masks["stratified"].sum() <= wanted + num_strata


@settings(max_examples=20, deadline=None)
@given(CASES)
def test_the_hardest(case):
    batch, seq, seed, ratio = case
    difficulty, valid = draw(batch, seq, seed)
    for name, rows in (("sequence_aware", [...]), ("topk", range(batch)), ("fixed_quota", range(batch))):
        mask = mask_of(name, difficulty, valid, ratio, min_tokens_per_sequence=0)
        for row in rows:
            taken, left = difficulty[row][mask[row]], difficulty[row][(valid & ~mask)[row]]
            assert not taken.numel() or not left.numel() or taken.min() >= left.max()


def test_ties_go_to_the_earlier_position():
    spread = mask_of("sequence_aware", torch.zeros(2, 4), ratio=0.5)
    assert spread.tolist() == [[True] * 4, [True, False, False, False]]
    assert mask_of("topk", torch.zeros(2, 4), ratio=0.5).tolist() == [[True, True, False, False]] * 2


def test_what_is_not_finite_comes_last():
    difficulty = torch.tensor([[torch.nan, 1.0, torch.inf, 2.0, -torch.inf]])
    assert mask_of("topk", difficulty, ratio=0.4).tolist() == [[False, True, False, True, False]]
    assert mask_of("topk", difficulty, ratio=1.0).all()


def test_sequence_aware_covers_an_easy_sequence():
    difficulty = torch.tensor([[9.0, 8.0, 7.0, 6.0], [1.0, 3.0, 2.0, 0.0]])
    covered = mask_of("sequence_aware", difficulty, ratio=0.25, min_tokens_per_sequence=2)
    assert covered.tolist() == [[True, True, False, False], [False, True, True, False]]
    assert mask_of("topk", difficulty, ratio=0.25).sum(1).tolist() == [1, 1]


@pytest.mark.parametrize("num_strata", [1, 3, 4, 40])
def test_every_stratum_is_represented(num_strata):
    difficulty = torch.randperm(40, generator=torch.Generator().manual_seed(0)).float().view(2, 20)
    mask = mask_of("stratified", difficulty, ratio=0.1, num_strata=num_strata)
    # difficulty 39 is rank 0
    strata = ((39 - difficulty[mask]) * num_strata / 40).long()
    assert strata.unique().numel() == num_strata


def test_stratified_is_uniform_inside_a_stratum():
    """Over many steps every token is taken as often as any other: the mean over the selected is not biased."""
    difficulty = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    steps = 800
    taken = sum(mask_of("stratified", difficulty, step=step).float() for step in range(steps))
    # standard deviation of a frequency 0.25 over 800 steps: 0.015
    assert ((taken / steps - 0.25).abs() < 0.07).all()
    assert torch.equal(mask_of("stratified", difficulty, step=5), mask_of("stratified", difficulty, step=5))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_one_token_and_none(selection):
    one = torch.zeros(1, 1)
    assert mask_of(selection, one).tolist() == [[True]]
    assert mask_of(selection, one, torch.zeros(1, 1, dtype=torch.bool)).tolist() == [[False]]
