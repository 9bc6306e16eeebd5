"""Arguments out of range, in every module that takes them."""

from __future__ import annotations

import pytest
import torch

from cggr_compile import CGGRLoss, CGGRModel, CGGRScorer


def loss(**arguments):
    return CGGRLoss(**arguments)


def scorer(**arguments):
    return CGGRScorer(torch.nn.Embedding(8, 8), **arguments)


def model(**arguments):
    return CGGRModel(torch.nn.Embedding(8, 8), **arguments)


@pytest.mark.parametrize("make", [loss, scorer, model])
@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        ("min_tokens_ratio", [0.0, -0.1, 1.01, float("nan"), "half", None, True], r"\(0, 1\]"),
        ("warmup_steps", [-1, 2.5, None], "integer >= 0"),
        ("threshold_sensitivity", [-0.1, 1.5, "low"], r"\[0, 1\]"),
        ("num_strata", [0, -2, 1.5], "integer >= 1"),
        ("min_tokens_per_sequence", [0, -1, 1.5], "integer >= 1"),
        ("scoring", ["entrpy", "random", None], "one of .*'entropy'"),
        ("selection", ["top_k", "random", 3], "one of .*'topk'"),
        ("dynamic_threshold", ["yes", 1], "True or False"),
    ],
)
def test_out_of_range(make, name, values, allowed):
    for value in values:
        with pytest.raises(ValueError, match=f"{name} must be .*{allowed}"):
            make(**{name: value})
