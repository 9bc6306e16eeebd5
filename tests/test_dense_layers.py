"""The warning about layers whose backward computes every position."""

from __future__ import annotations

import re
import warnings
from types import SimpleNamespace

import models
import pytest
import torch

import cggr_compile
from cggr_compile.dense_layers import dense_layers
from cggr_compile.options import Options
from cggr_compile.passes.joint.row_sparse.rule import RULES
from cggr_compile.report import GraphReport, PassRecord
from cggr_compile.runtime import FallbackWarning

BLOCKS = [SimpleNamespace(name=f"model.layers.{i}", mixer=None) for i in range(12)]


def message(details, blocks=BLOCKS, **options):
    gradient = options.get("gradient", "routed")
    report = GraphReport(0, True, "eager", Options(**options).as_dict(), level="routed", gradient=gradient)
    report.passes.append(PassRecord("row_sparse", "joint", True, "", details))
    return dense_layers(report, blocks)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("model.layers.1.mlp", "aten.op.default in model.layers.1.mlp"),
        ("model.layers.11", "aten.op.default in model.layers.11"),
        ("model.layers", None),
        ("model.embed_positions", None),
        ("", None),
        (None, "aten.op.default (once)"),  # unknown: it may be in a layer
    ],
)
def test_only_what_is_in_a_layer(place, said):
    text = message({"densified_at": {"aten.op.default": [place]}})
    assert text.endswith(said) if said else text == ""


def test_layers_that_are_no_modules():
    blocks = [SimpleNamespace(name=f"block_{i}", mixer=None) for i in range(2)]
    assert "aten.op.default (2 times)" in message({"densified_at": {"aten.op.default": ["", ""]}}, blocks)


def test_names_one_layer_and_counts_the_others():
    places = [f"model.layers.{i}.mlp" for i in (2, 1, 0)] + ["model.embed_positions"]
    assert message({"densified_at": {"a": places}}).endswith("a in model.layers.0.mlp and 2 more")


def test_attention_says_why():
    assert message({"dense_attention": {"dropout": 12}}).endswith("attention in 12 layers: dropout")


def test_exact_gradients_are_dense_by_definition():
    assert message({"densified_at": {"a": [None]}}, gradient="exact") == ""


def test_nothing_is_known_of_a_cached_graph():
    assert message({}) == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, r"aten\.cat\.default in transformer\.h\.0\.attn and 1 more$"),
        ({"fallback": "silent"}, None),
    ],
)
def test_warns_once_per_model(options, said, monkeypatch):
    monkeypatch.delitem(RULES, torch.ops.aten.cat.default)
    model = models.family("gpt2", n_layer=2 if said else 1)
    model.compile(
        backend=models.backend(), dynamic=False, options={"compiler": "eager", "fallback": "error", **options}
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seq in (8, 12) if said else (8,):
            model(**models.make_batch(2, seq))
    ours = [str(w.message) for w in caught if issubclass(w.category, FallbackWarning)]
    assert cggr_compile.runtime(model).metrics()["matched"] and len(ours) == (1 if said else 0)
    assert not said or re.search(said, ours[0])


@pytest.mark.parametrize("place", ["model.layers.3.conv", "model.layers.3.conv.in_proj", None])
def test_a_token_mixer_is_dense_by_nature(place):
    mixed = [*BLOCKS[:3], SimpleNamespace(name="model.layers.3", mixer=SimpleNamespace(name="model.layers.3.conv"))]
    places = ["model.layers.3.mlp", place]
    text = message({"densified_at": {"aten.op.default": places}}, mixed)
    assert "aten.op.default in model.layers.3.mlp" in text and "more" not in text
    assert not message({"densified_at": {"aten.op.default": [place]}}, mixed)
