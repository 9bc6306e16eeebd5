"""Arguments out of range, in every module that takes them."""

from __future__ import annotations

import inspect

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


def test_order_and_defaults():
    """As code written for the original modules passes them."""
    shared = [
        *(("scoring", "combined"), ("min_tokens_ratio", 0.25), ("warmup_steps", 1000), ("dynamic_threshold", True)),
        *(("threshold_sensitivity", 0.5), ("selection", "topk"), ("num_strata", 4), ("min_tokens_per_sequence", 1)),
    ]

    def given(cls):
        return [(name, p.default) for name, p in inspect.signature(cls).parameters.items()]

    assert given(CGGRScorer)[1:] == shared
    assert given(CGGRModel)[2:-1] == shared
    assert given(CGGRLoss) == [
        *(("scoring", "combined"), ("selection", "topk"), ("dynamic_threshold", True), ("threshold_sensitivity", 0.5)),
        *(("min_tokens_ratio", 0.25), ("warmup_steps", 1000), ("num_strata", 4), ("min_tokens_per_sequence", 1)),
        ("base_loss", None),
    ]
