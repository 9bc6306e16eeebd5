"""``place_token_values`` against the operator whose values it places, at rows that it takes itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.test_token_log_probs import MODES, VALUES, call, check, make_case, make_grads, random_rows
from torch.library import opcheck

from cggr_compile.ops.place_token_values import place_token_values

NAMES = ("d_hidden", "d_weight", "d_bias")


def arguments(batch, length, slots, used, modes=MODES[1], extra=(True, True), dtype=torch.float32):
    """What the operator is called with, and what ``token_log_probs`` is for the same."""
    case = make_case(batch * length, 12, 5, dtype=dtype, **modes)
    hidden, weight, bias, labels, *numbers = case
    hidden, labels = hidden.view(batch, length, 5), labels.view(batch, length)
    rows, factors = random_rows(batch, length, slots, used)
    row_hidden = hidden.gather(1, rows[:, :, None].expand(-1, -1, 5))
    leaves = [None if t is None else t.clone().requires_grad_() for t in (row_hidden, weight, bias)]
    with torch.no_grad():
        exact = call((hidden, weight, bias, labels, *numbers), (*extra, True))[:5]
    index = torch.arange(batch)[:, None] * length + rows
    placing = (*exact, labels, *leaves, index, factors, *numbers)
    return placing, (hidden, *leaves[1:], labels, *numbers), (leaves[0], rows, factors), leaves


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 8),
    st.integers(0, 8),
    st.integers(0, 8),
    st.sampled_from(MODES),
    st.sets(st.sampled_from(VALUES[:5]), min_size=1),
)
def test_the_gradient_of_rows(batch, length, slots, used, modes, wanted):
    placing, case, rows, leaves = arguments(batch, length, min(slots, length), used, modes)
    placed = place_token_values(*placing)
    for value, exact in zip(placed, placing, strict=False):
        assert torch.equal(value, exact) and (not exact.numel() or value.data_ptr() != exact.data_ptr())
    grads = make_grads(case, wanted)
    outputs = [(mine, theirs, g) for mine, theirs, g in zip(placed, call(case, rows=rows), grads, strict=False)]
    mine, theirs, given_ = zip(*(output for output in outputs if output[2] is not None), strict=True)
    trained = [t for t in leaves if t is not None]
    found = torch.autograd.grad(mine, trained, given_, allow_unused=True, materialize_grads=True)
    check(found, torch.autograd.grad(theirs, trained, given_, allow_unused=True, materialize_grads=True), 1e-6, NAMES)


def test_a_slot_that_is_not_used_passes_nothing_on():
    placing, *_, leaves = arguments(2, 6, 4, 2)
    grads = [torch.ones_like(value) for value in placing[:5]]
    for grad in grads:
        grad.view(-1)[placing[9][:, 2:]] = torch.nan
    found = torch.autograd.grad(place_token_values(*placing), leaves, grads)
    assert all(gradient.isfinite().all() for gradient in found) and not found[0][:, 2:].any()


@pytest.mark.parametrize("extra", [(True, True), (False, False)])
def test_opcheck(extra):
    placing, *_ = arguments(2, 6, 4, 3, extra=extra)
    assert placing[3].numel() == placing[4].numel() == (12 if extra[0] else 0)
    opcheck(place_token_values, placing)
