from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from cggr_compile.ops.check_labels import check_labels


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-4, 8), max_size=6), st.integers(1, 6), st.sampled_from([-100, -1, 0, 2, 7]))
def test_refuses_what_cross_entropy_refuses(labels, vocab, ignore_index):
    target = torch.tensor(labels, dtype=torch.int64)
    try:
        F.cross_entropy(torch.zeros(len(labels), vocab), target, ignore_index=ignore_index, reduction="sum")
    except IndexError:
        wrong = next(y for y in labels if y != ignore_index and not 0 <= y < vocab)
        with pytest.raises(ValueError, match=rf"labels must be in \[0, {vocab}\) or {ignore_index} .* got {wrong}$"):
            check_labels(target, vocab, ignore_index)
    else:
        checked = check_labels(target, vocab, ignore_index)
        assert torch.equal(checked, target) and (not labels or checked.data_ptr() != target.data_ptr())
