from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cggr_compile.passes.joint.row_sparse.layout import align, canonical, has_rows, regroup, resize

CASES = [
    (2, (2, 16, 32), ("B", "S", None), (32, 32), ("BS", None)),
    (2, (32, 32), ("BS", None), (2, 16, 32), ("B", "S", None)),
    (2, (2, 16, 32), ("B", "S", None), (2, 16, 4, 8), ("B", "S", None, None)),
    (2, (2, 16, 4, 8), ("B", "S", None, None), (2, 16, 32), ("B", "S", None)),
    (2, (2, 4, 16, 8), ("B", None, "S", None), (2, 2, 2, 16, 8), ("B", None, None, "S", None)),
    # heads flattened with sequences, as products of matrices take them
    (2, (2, 4, 16, 8), ("B", None, "S", None), (8, 16, 8), ("B*", "S", None)),
    (2, (8, 16, 8), ("B*", "S", None), (2, 4, 16, 8), ("B", None, "S", None)),
    (2, (8, 16, 8), ("B*", "S", None), (2, 2, 2, 16, 8), ("B", None, None, "S", None)),
    (2, (2, 2, 2, 16, 8), ("B", None, None, "S", None), (4, 2, 16, 8), ("B*", None, "S", None)),
    (2, (4, 2, 16, 8), ("B*", None, "S", None), (8, 16, 8), ("B*", "S", None)),
    (2, (2, 6, 16), ("B", None, "S"), (4, 3, 16), ("B*", None, "S")),
    (2, (2, 1, 16, 8), ("B", None, "S", None), (2, 16, 8), ("B", "S", None)),
    # sizes that coincide: B = S = heads = head size
    (4, (4, 4, 16), ("B", "S", None), (4, 4, 4, 4), ("B", "S", None, None)),
    (4, (4, 4, 16), ("B", "S", None), (16, 16), ("BS", None)),
    (4, (16, 16), (None, "BS"), (16, 4, 4), (None, "B", "S")),
    (4, (4, 4, 4, 4), ("B", None, "S", None), (16, 4, 4), ("B*", "S", None)),
    (4, (16, 4, 4), ("B*", "S", None), (4, 4, 4, 4), ("B", None, "S", None)),
    # one sequence has no axis of its own
    (1, (1, 16, 32), (None, "BS", None), (16, 32), ("BS", None)),
    (1, (16, 32), ("BS", None), (1, 16, 32), (None, "BS", None)),
    (1, (1, 4, 16, 8), (None, None, "BS", None), (1, 2, 2, 16, 8), (None, None, None, "BS", None)),
    (1, (1, 4, 16, 8), (None, None, "BS", None), (4, 16, 8), (None, "BS", None)),
    # positions mixed with something else, sequences split, something in front of them
    (2, (2, 16, 32), ("B", "S", None), (2, 512), None),
    (2, (2, 16, 32), ("B", "S", None), (4, 8, 32), None),
    (2, (2, 4, 16, 8), ("B", None, "S", None), (2, 64, 8), None),
    (2, (8, 16, 8), ("B*", "S", None), (2, 64, 8), None),
    (4, (32, 32), ("BS", None), (8, 4, 32), None),
    (4, (4, 6, 16), ("B", None, "S"), (2, 12, 16), None),
    (2, (4, 2, 16), (None, "B", "S"), (8, 16), None),
]


@pytest.mark.parametrize(("batch", "old", "layout", "new", "expected"), CASES)
def test_regroup(batch, old, layout, new, expected):
    assert regroup(old, layout, new, batch) == expected


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.data())
def test_rows_of_a_view_are_the_view_of_the_rows(batch, length, heads, width, data):
    """For every pair of shapes of the kind that models use: regrouping is exact wherever it answers."""
    shapes = [
        ((batch, length, heads * width), ("B", "S", None)),
        ((batch, length, heads, width), ("B", "S", None, None)),
        ((batch * length, heads * width), ("BS", None)),
        ((batch, length * heads * width), None),
        ((batch * length * heads, width), None),
        ((batch, heads, length, width), ("B", None, "S", None)),
        ((batch * heads, length, width), ("B*" if heads > 1 else "B", "S", None)),
        ((batch, heads * length, width), None),
    ]
    (old, layout) = data.draw(st.sampled_from([s for s in shapes if s[1]]))
    (new, _) = data.draw(st.sampled_from(shapes))
    found = regroup(old, canonical(layout, batch), new, batch)
    if found is None:
        return
    assert has_rows(found) and canonical(found, batch) == found
    slots = data.draw(st.integers(1, length))
    rows = torch.stack([torch.randperm(length)[:slots].sort().values for _ in range(batch)])
    dense = torch.arange(math.prod(old)).view(old)
    taken = take(dense, canonical(layout, batch), rows, length).reshape(resize(new, found, batch, slots))
    assert torch.equal(taken, take(dense.view(new), found, rows, length))


def take(tensor, layout, rows, length):
    batch = rows.shape[0]
    if "BS" in layout:
        flat = (rows + torch.arange(batch)[:, None] * length).flatten()
        return tensor.index_select(layout.index("BS"), flat)
    axis, fold = layout.index("S"), tensor.shape[0] // batch
    return torch.stack([part.index_select(axis - 1, rows[i // fold]) for i, part in enumerate(tensor)])


def test_align():
    layout, shape = ("B", None, "S", None), (2, 4, 16, 8)
    assert align(layout, shape, (2, 4, 16, 8)) == layout
    assert align(layout, shape, (1, 1, 16, 8)) == ("b", None, "S", None)
    assert align(layout, shape, (2, 1, 1, 1)) == ("B", None, None, None)
    assert align(layout, shape, (8,)) == (None,)
    assert align(layout, shape, (16, 8)) is None  # needs a batch axis first
    folded, shape = ("B*", "S", None), (8, 16, 8)
    assert align(folded, shape, (8, 1, 8)) == ("B*", None, None)
    assert align(folded, shape, (1, 16, 8)) is None  # one set of rows cannot stand for several sequences'
    assert align((None, "BS", None), (1, 16, 8), (16, 1)) == ("BS", None)
