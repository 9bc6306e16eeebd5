"""Arguments out of range, in every module that takes them."""

from __future__ import annotations

import inspect
from typing import get_type_hints

import pytest
import torch

from cggr_compile import CGGRLoss, CGGRModel, CGGRScorer
from cggr_compile.modules.settings import Arguments, Settings


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


def test_by_position_and_by_name():
    router, base_loss = torch.nn.Embedding(8, 8), torch.nn.CrossEntropyLoss(reduction="none")
    given = CGGRLoss("margin", "stratified", False, 0.1, 0.5, 3, 2, 7, base_loss)
    names = ("dynamic_threshold", "threshold_sensitivity", "min_tokens_ratio", "warmup_steps", "num_strata")
    named = dict(zip(names, (False, 0.1, 0.5, 3, 2), strict=True), scoring="margin", selection="stratified")
    wanted = Settings(**named, min_tokens_per_sequence=7)
    assert given.settings == wanted and given.base_loss is base_loss
    assert CGGRScorer(router, "margin", 0.5, 3, False, 0.1, "stratified", 2, 7).settings == wanted
    assert CGGRScorer(min_tokens_per_sequence=7, router=router, **named).settings == wanted
    for wrong in (lambda: loss(scorings="margin"), lambda: CGGRScorer(), lambda: CGGRLoss("margin", scoring="loss")):
        with pytest.raises(TypeError, match="argument"):
            wrong()


def test_the_arguments_are_the_settings():
    assert get_type_hints(Arguments) == get_type_hints(Settings)
