from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cggr_compile.passes.row_sparse.layout import align, regroup, resize

CASES = [
    ((2, 16, 32), ("B", "S", None), (32, 32), ("BS", None)),
    ((32, 32), ("BS", None), (2, 16, 32), ("B", "S", None)),
    ((2, 16, 32), ("B", "S", None), (2, 16, 4, 8), ("B", "S", None, None)),
    ((2, 16, 4, 8), ("B", "S", None, None), (2, 16, 32), ("B", "S", None)),
    ((2, 4, 16, 8), ("B", None, "S", None), (2, 2, 2, 16, 8), ("B", None, None, "S", None)),
    # sizes that coincide: B = S = heads = head size
    ((4, 4, 16), ("B", "S", None), (4, 4, 4, 4), ("B", "S", None, None)),
    ((4, 4, 16), ("B", "S", None), (16, 16), ("BS", None)),
    ((16, 16), (None, "BS"), (16, 4, 4), (None, "B", "S")),
    # one sequence
    ((1, 16, 32), ("B", "S", None), (16, 32), ("BS", None)),
    ((16, 32), ("BS", None), (1, 16, 32), ("B", "S", None)),
    ((1, 4, 16, 8), ("B", None, "S", None), (1, 2, 2, 16, 8), ("B", None, None, "S", None)),
    # positions mixed with something else
    ((2, 16, 32), ("B", "S", None), (2, 512), None),
    ((2, 16, 32), ("B", "S", None), (4, 8, 32), None),
    ((2, 4, 16, 8), ("B", None, "S", None), (8, 16, 8), None),
]


@pytest.mark.parametrize(("old", "layout", "new", "expected"), CASES)
def test_regroup(old, layout, new, expected):
    assert regroup(old, layout, new, batch=1 if 1 in old + new else 4 if old[0] == 4 or new[0] == 4 else 2) == expected


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.data())
def test_rows_of_a_view_are_the_view_of_the_rows(batch, length, heads, width, data):
    """For every pair of shapes of the kind that models use: regrouping is exact wherever it answers."""
    shapes = [
        ((batch, length, heads * width), ("B", "S", None)),
        ((batch, length, heads, width), ("B", "S", None, None)),
        ((batch * length, heads * width), ("BS", None)),
        ((batch, length * heads * width), None),
        ((batch * length * heads, width), None),
    ]
    (old, layout) = data.draw(st.sampled_from([s for s in shapes if s[1]]))
    (new, _) = data.draw(st.sampled_from(shapes))
    found = regroup(old, layout, new, batch)
    if found is None:
        return
    assert "BS" in found or ("B" in found and "S" in found)
    slots = data.draw(st.integers(1, length))
    rows = torch.stack([torch.randperm(length)[:slots].sort().values for _ in range(batch)])
    dense = torch.arange(math.prod(old)).view(old)
    taken = take(dense, layout, rows, length).reshape(resize(new, found, batch, slots))
    assert torch.equal(taken, take(dense.view(new), found, rows, length))


def take(tensor, layout, rows, length):
    batch = rows.shape[0]
    if "BS" in layout:
        flat = (rows + torch.arange(batch)[:, None] * length).flatten()
        return tensor.index_select(layout.index("BS"), flat)
    return torch.stack([tensor[b].index_select(layout.index("S") - 1, rows[b]) for b in range(batch)])


def test_align():
    layout, shape = ("B", None, "S", None), (2, 4, 16, 8)
    assert align(layout, shape, (2, 4, 16, 8)) == layout
    assert align(layout, shape, (1, 1, 16, 8)) == ("b", None, "S", None)
    assert align(layout, shape, (2, 1, 1, 1)) == ("B", None, None, None)
    assert align(layout, shape, (8,)) == (None,)
    assert align(layout, shape, (16, 8)) is None  # needs a batch axis first
