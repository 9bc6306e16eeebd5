from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from cggr_compile.ops.top_quantile import top_quantile


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 30), st.floats(0.01, 1.0), st.floats(0.0, 1.0), st.booleans(), st.integers(0, 99)
)
def test_what_a_quantile_keeps_and_two_more(batch, length, share, part, ties, seed):
    torch.manual_seed(seed)
    values = torch.rand(batch, length)
    values = (values * 4).round() if ties else values
    valid = torch.rand(batch, length) < part
    found = top_quantile(values, valid, share)
    assert not (found & ~valid).any()
    if valid.any():
        wanted = valid & (values >= torch.quantile(values[valid], 1.0 - share))
        assert not (wanted & ~found).any()
        assert ties or found.sum() - wanted.sum() <= 2
        assert values[valid & ~found].numel() == 0 or values[valid & ~found].max() < values[found].min()


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_the_ends(share):
    values, nothing = torch.rand(2, 10), torch.zeros(2, 10, dtype=torch.bool)
    assert not top_quantile(values, nothing, share).any()
    assert top_quantile(values, ~nothing, share).sum() == (20 if share == 1.0 else 6)
    values[0, 3] = torch.nan
    assert not top_quantile(values, ~nothing, 0.2)[0, 3]


def test_opcheck():
    opcheck(top_quantile, (torch.rand(3, 7), torch.rand(3, 7) < 0.6, 0.3))
