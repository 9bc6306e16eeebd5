"""The same scores give the same tokens on every device; and weights but for the last bit of a division."""

from __future__ import annotations

import pytest
import torch
from ops.test_sample import make_case, select_in_every_way, state


@pytest.mark.parametrize("compile_it", [False, True])
def test_same_tokens_as_on_the_cpu(compile_it):
    select = torch.compile(select_in_every_way) if compile_it else select_in_every_way
    with torch._inductor.config.patch(force_disable_caches=True):
        for shape in ("entropy", "heavy", "ties", "tiny", "huge"):
            case = (*make_case(8, 1024, shape, 1), state(5))
            for ours, theirs in zip(select(*(x.cuda() for x in case)), select_in_every_way(*case), strict=True):
                exact = 2e-7 if theirs.is_floating_point() and compile_it else 0  # Triton's division is approximate
                torch.testing.assert_close(ours.cpu(), theirs, rtol=exact, atol=0)
