"""The same scores give the same tokens on every device; and weights but for the last bit of a division."""

from __future__ import annotations

import pytest
import torch
from ops.test_sample import make_case, select_in_every_way, state

# of what select_in_every_way returns: weights, and the probabilities of strata; Triton's division is approximate
DIVIDED = (3, 7, 9)


@pytest.mark.parametrize("compile_it", [False, True])
def test_same_tokens_as_on_the_cpu(compile_it):
    select = torch.compile(select_in_every_way) if compile_it else select_in_every_way
    with torch._inductor.config.patch(force_disable_caches=True):
        for shape in ("entropy", "heavy", "ties", "tiny", "huge"):
            case = (*make_case(8, 1024, shape, 1), state(5))
            pairs = zip(select(*(x.cuda() for x in case)), select_in_every_way(*case), strict=True)
            for i, (ours, theirs) in enumerate(pairs):
                rounding = 2e-7 if compile_it and i in DIVIDED else 0
                torch.testing.assert_close(ours.cpu(), theirs, rtol=rounding, atol=0)
