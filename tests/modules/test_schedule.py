from __future__ import annotations

import pytest
import torch

from cggr_compile.modules.schedule import adjust_to_confidence, curriculum_ratio


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.4, 0.7, 1.0])
def test_curriculum_is_linear_and_exact_at_its_ends(ratio):
    at = {step: curriculum_ratio(torch.tensor(step), ratio, 10) for step in (0, 5, 10, 11, 1000)}
    assert at[0] == 1.0 and at[10] == at[11] == at[1000] == torch.tensor(ratio)
    assert at[5].item() == pytest.approx(1.0 - 0.5 * (1.0 - ratio))


def test_no_warm_up():
    assert curriculum_ratio(torch.tensor(0), 0.25, 0) == 0.25


def test_confidence_lowers_and_raises_the_ratio():
    def adjusted(ratio, confidence, sensitivity):
        return adjust_to_confidence(torch.tensor(ratio), torch.tensor(confidence), sensitivity).item()

    assert adjusted(0.4, 0.5, 0.5) == pytest.approx(0.4)
    assert adjusted(0.4, 0.1, 0.5) == pytest.approx(0.56)
    assert adjusted(0.4, 0.9, 0.5) == pytest.approx(0.24)  # below the base ratio
    assert adjusted(0.4, 0.9, 0.0) == pytest.approx(0.4)
    assert adjusted(0.9, 0.0, 1.0) == 1.0
