"""Columns on rows beside dense ones: where a value's parts are found, and where they come to lie in its views."""

from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from row_sparse_comparison import compare
from torch.fx.experimental.proxy_tensor import make_fx

from cggr_compile.passes.joint.row_sparse.columns import columns_of
from cggr_compile.passes.joint.row_sparse.division import Division

aten = torch.ops.aten
BATCH, LENGTH = 2, 3
TOKENS = ("B", "S", None)


def marks(division, shape):
    """What is on rows, as a mask of a value's shape."""
    piece = torch.cat([torch.full((width,), kind) for width, kind in division.pieces])
    along = [1] * len(shape)
    along[division.axis] = -1
    return piece.repeat(division.outer).view(along).expand(shape)


@given(
    st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=2, max_size=4),
    *(st.integers(1, 4) for _ in range(3)),
    st.data(),
)
def test_views_keep_the_columns(pieces, unit, outer, inner, data):
    """Wherever a view is answered, the mask of its columns is the view of the mask."""
    pieces = tuple((width * unit, kind) for width, kind in pieces)
    width = outer * sum(width for width, _ in pieces)
    old = (BATCH, LENGTH, width, inner)
    division = Division((*TOKENS, None), 2, outer, pieces)
    features = width * inner
    splits = [(a, b, features // a // b) for a in range(1, features + 1) for b in range(1, features + 1)
              if features % a == 0 and features // a % b == 0]  # fmt: skip
    new = (*data.draw(st.sampled_from([(BATCH, LENGTH), (BATCH * LENGTH,)])), *data.draw(st.sampled_from(splits)))
    found = division.viewed(old, new, BATCH)
    if found is not None:
        assert torch.equal(marks(found, new), marks(division, old).reshape(new))
        assert found.width(True) + found.width(False) == new[found.axis]


@pytest.mark.parametrize(
    ("division", "old", "new", "expected"),
    [
        # [Q | K, V] side by side, flattened with sequences
        (Division(TOKENS, 2, 1, ((8, True), (16, False))), (2, 3, 24), (6, 24),
         Division(("BS", None), 1, 1, ((8, True), (16, False)))),
        # by heads: [heads, (Q, K, V)] and back
        (Division((*TOKENS, None), 3, 1, ((2, True), (4, False))), (2, 3, 4, 6), (2, 3, 24),
         Division(TOKENS, 2, 4, ((2, True), (4, False)))),
        (Division(TOKENS, 2, 4, ((2, True), (4, False))), (2, 3, 24), (2, 3, 4, 6),
         Division((*TOKENS, None), 3, 1, ((2, True), (4, False)))),
        # an axis for the kinds themselves
        (Division(TOKENS, 2, 4, ((2, True), (4, False))), (2, 3, 24), (2, 3, 4, 3, 2),
         Division((*TOKENS, None, None), 3, 1, ((1, True), (2, False)))),
        # across the kinds, and among tokens
        (Division(TOKENS, 2, 1, ((8, True), (16, False))), (2, 3, 24), (2, 3, 2, 12), None),
        (Division(TOKENS, 2, 1, ((8, True), (16, False))), (2, 3, 24), (2, 72), None),
        (Division(("B", None, "S"), 1, 1, ((1, True), (1, False))), (2, 2, 3), (4, 3), None),
    ],
)  # fmt: skip
def test_views(division, old, new, expected):
    assert division.viewed(old, new, BATCH) == expected


def traced(function, *args):
    gm = make_fx(function, tracing_mode="fake")(*args)
    return gm, gm.graph.output_node().args[0]


def written(*parts):
    def function(*values):
        total = None
        for part, value in zip(parts, values, strict=True):
            zeros = aten.full.default([2, 6], 0)
            one = part(zeros, value)
            total = one if total is None else aten.add.Tensor(total, one)
        return total

    return function


def piece(start, stop, step=1):
    return lambda zeros, value: aten.slice_scatter.default(zeros, value, 1, start, stop, step)


def column(index):
    return lambda zeros, value: aten.select_scatter.default(zeros, value, 1, index)


def listed(*columns):
    return lambda zeros, value: aten.index_put.default(zeros, [None, torch.tensor(columns)], value, True)


@pytest.mark.parametrize(
    ("parts", "widths", "expected"),
    [
        ([piece(0, 4), piece(4, 2**63 - 1)], [4, 2], [(0, 4), (4, 6)]),
        ([piece(2, -1), piece(-6, 2), piece(5, 6)], [3, 2, 1], [(0, 2), (2, 5), (5, 6)]),
        ([column(-1), piece(0, 5)], [0, 5], [(0, 5), (5, 6)]),
        ([listed(-2), listed(-1), piece(0, -2)], [1, 1, 4], [(0, 4), (4, 5), (5, 6)]),
        ([listed(1, 2)], [2], [(1, 3)]),
        ([listed(2, 0)], [2], None),  # in another order
        ([piece(0, 6, 2)], [3], None),
        ([piece(0, 4), piece(3, 6)], [4, 3], None),  # both write one column
    ],
)
def test_parts(parts, widths, expected):
    values = [torch.ones(2, width) if width else torch.ones(2) for width in widths]
    _, node = traced(written(*parts), *values)
    found = columns_of(node)
    assert (found and [(part.start, part.stop) for part in found.parts]) == expected
    if found is not None:
        assert found.axis == 1 and found.covers(6) == (sum(part.width for part in found.parts) == 6)
        assert [part.flat for part in found.parts] == [len(p.value.meta["val"].shape) == 1 for p in found.parts]


def test_something_is_there_already():
    values = torch.ones(2, 6), torch.ones(2, 2)
    _, node = traced(lambda full, value: aten.slice_scatter.default(full, value, 1, 0, 2), *values)
    assert columns_of(node) is None


def middle(q, k, v, mask=None):
    """The queries are the second piece of the projection."""
    return models.attend_sdpa(k, q, v, mask)


class Between(torch.nn.Linear):
    """A fused projection with something behind it."""

    def __init__(self, function):
        super().__init__(models.HIDDEN, 3 * models.HIDDEN)
        self.function = function

    def forward(self, x):
        return self.function(super().forward(x))


@pytest.mark.parametrize(
    ("function", "attend", "dense"),
    [
        (lambda x: -x * 0.5, middle, None),
        (torch.tanh, models.attend_sdpa, "aten.mul.Tensor"),  # by a factor that would have to be split too
    ],
)
def test_what_lies_between_a_projection_and_its_parts(function, attend, dense):
    batch = models.make_batch()

    def make():
        torch.manual_seed(0)
        model = models.Decoder(attend, tied=False, layers=1)
        model.blocks[0].qkv = models.randomise(Between(function))
        return model

    def call(model):
        return F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())

    record = compare(make, call)
    assert record.details["densified"] == ({dense: 1} if dense else {})
