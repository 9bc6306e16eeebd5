from __future__ import annotations

import dataclasses
import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cggr_compile import Options

BAD = [
    ({"min_tokens_ratio": 0}, "min_tokens_ratio"),
    ({"min_tokens_ratio": 1.5}, "min_tokens_ratio"),
    ({"min_tokens_ratio": float("nan")}, "min_tokens_ratio"),
    ({"min_tokens_ratio": "0.25"}, r"min_tokens_ratio must be 'auto' or a number in \(0, 1\], got '0.25'"),
    ({"min_tokens_ratio": True}, "min_tokens_ratio"),
    ({"scoring": "entropie"}, r"scoring .*did you mean 'entropy'"),
    ({"scoring": 3}, "scoring must be one of"),
    ({"selection": "top_k"}, r"selection .*did you mean 'topk'"),
    ({"selection": None}, "selection"),
    ({"gradient": "route"}, "gradient .*did you mean 'routed'"),
    ({"kv_gradient": "values"}, "kv_gradient"),
    ({"kv_weight": 1}, r"kv_weight must be one of \['1', '1/sqrt\(p\)'\], got 1"),
    ({"kv_weight": "1/sqrt(p)", "selection": "topk"}, "kv_weight.* needs .* a selection that samples"),
    ({"kv_weight": "1/sqrt(p)", "gradient": "exact"}, "kv_weight.* needs gradient='routed'"),
    ({"logits": True}, "logits"),
    ({"cross_entropy": "fuse"}, "cross_entropy must be one of .*did you mean 'fused'"),
    ({"padding": "left"}, "padding"),
    ({"fallback": "raise"}, "fallback"),
    ({"compiler": "triton"}, "compiler"),
    ({"advance": 1}, "advance"),
    ({"router_layers": 0}, "router_layers"),
    ({"router_layers": "all"}, "router_layers"),
    ({"router_layers": True}, "router_layers"),
    ({"row_sparse": 1}, "row_sparse"),
    ({"verify": -1}, "verify must be True, False or a number of steps >= 0, got -1"),
    ({"verify": 2.0}, "verify"),
    ({"cuda_graphs": 1}, "cuda_graphs must be True or False"),
    ({"seed": -1}, "seed"),
    ({"seed": 1.0}, "seed"),
    ({"warmup_steps": -1}, "warmup_steps must be an integer >= 0, got -1"),
    ({"warmup_steps": 10.0}, "warmup_steps"),
    ({"ladder": []}, "ladder"),
    ({"ladder": 0.5}, "ladder"),
    ({"ladder": [0.5, 0.0]}, r"ladder must be in \(0, 1\], got 0.0"),
    ({"ladder": [1.5]}, "ladder"),
    ({"ladder": ["0.5"]}, "ladder"),
    ({"dynamic_threshold": 1}, "dynamic_threshold"),
    ({"dynamic_threshold": True, "scoring": "random"}, "dynamic_threshold needs the router's confidence"),
    ({"threshold_sensitivity": 1.01}, r"threshold_sensitivity must be in \[0, 1\], got 1.01"),
    ({"threshold_sensitivity": -0.1}, "threshold_sensitivity"),
    ({"threshold_sensitivity": float("nan")}, "threshold_sensitivity"),
    ({"variance_bound": 0.0}, "variance_bound must be a number > 0"),
    ({"variance_bound": "small"}, "variance_bound"),
    ({"measure_every": 0}, "measure_every must be an integer >= 1"),
    ({"min_tokens_ratio": "auto", "selection": "topk"}, "'auto' measures the variance of a random selection"),
    (
        {"dynamic_threshold": True, "scoring": "learned"},
        r"dynamic_threshold needs the router's confidence: scoring must be one of \['combined', .*got 'learned'",
    ),
    ({"min_tokens_ratio": "auto", "dynamic_threshold": True}, "dynamic_threshold must be False"),
    ({"min_tokens_ratio": "auto", "ladder": [1.0]}, "ladder must have a ratio below 1.0"),
    ({"dump_dir": 3}, "dump_dir"),
    ({"inductor": "max_autotune"}, "inductor"),
    ({"min_token_ratio": 0.5}, "unknown option 'min_token_ratio', did you mean 'min_tokens_ratio'"),
    ({"zzz": 0.5}, "unknown option 'zzz'; options: min_tokens_ratio"),
    ({"selection": "topk", "scoring": "random"}, "scoring"),
    ({"selection": "stratified", "scoring": "random"}, "scoring"),
    ({"scope": "all"}, "scope"),
    ({"scope": "batch", "selection": "labels"}, "scope='batch' is for selection in .*'importance'"),
    ({"scope": "batch", "selection": "stratified"}, "scope"),
    ({"num_strata": 0}, "num_strata must be an integer >= 1, got 0"),
    ({"num_strata": 2.0}, "num_strata"),
    ({"span": 0}, "span must be an integer >= 1, got 0"),
    ({"span": 64.0}, "span must be an integer >= 1, got 64.0"),
    ({"span": True}, "span must be an integer >= 1, got True"),
    ({"min_tokens_per_sequence": 0}, "min_tokens_per_sequence must be an integer >= 1"),
    ({"min_tokens_per_sequence": True}, "min_tokens_per_sequence"),
    ({"max_selected": 0, "selection": "labels"}, "max_selected must be a share"),
    ({"max_selected": 0.0, "selection": "labels"}, "max_selected"),
    ({"max_selected": 1.5, "selection": "labels"}, "max_selected"),
    ({"max_selected": True, "selection": "labels"}, "max_selected"),
    ({"max_selected": float("nan"), "selection": "labels"}, "max_selected"),
    (
        {"max_selected": 0.5, "selection": "importance"},
        r"max_selected is for selection in \['labels', .*\] or scope='batch'",
    ),
    ({"context": -1}, "context must be 'auto' or an integer >= 0, got -1"),
    ({"context": True}, "context must be 'auto' or an integer >= 0, got True"),
    ({"context": 2.0}, "context must be 'auto' or an integer >= 0, got 2.0"),
    ({"context": "all"}, "context must be 'auto' or an integer >= 0, got 'all'"),
    ({"context": None}, "context must be 'auto' or an integer >= 0, got None"),
    ({"context": 3, "gradient": "exact"}, "context=3 needs gradient='routed'.*got gradient='exact'"),
    ({"context": 0, "max_selected": 0.5, "selection": "random"}, "max_selected is for .*, or with context > 0"),
    (["ratio"], "options must be a dict"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        Options.parse(options)


def test_defaults_and_parse():
    assert Options.parse(None) == Options() == Options.parse({})
    assert Options.parse(Options(seed=3)).seed == 3
    assert Options.parse({"router_layers": "full"}).router_layers == "full"


def test_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().seed = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        Options(0.5)  # type: ignore[misc]


@given(st.floats(1e-6, 1.0))
def test_ratio_is_a_usable_fraction(ratio):
    fraction = Options(min_tokens_ratio=ratio).ratio
    assert 0 < fraction <= 1 and abs(fraction - Fraction(ratio)) <= Fraction(1, 10_000)


def double_entropy(lse, entropy, top1, top2, label_logprob):
    return 2 * entropy


def test_a_function_as_scoring():
    options = Options(scoring=double_entropy)
    assert options.needs_router and options.scoring_name == f"{__name__}.double_entropy"
    assert json.loads(json.dumps(options.as_dict()))["scoring"] == options.scoring_name
    assert options.digest() == Options(scoring=double_entropy).digest() != Options().digest()

    def interpreted(factor):
        scope = {}
        exec(f"def score(lse, entropy, top1, top2, label_logprob): return {factor} * entropy", scope)
        return Options(scoring=scope["score"]).digest()

    assert interpreted(2) == interpreted(2) != interpreted(3)


def test_slots_of_a_sequence():
    assert Options().most_slots == Fraction(1, 4)
    assert Options(scope="batch").most_slots == Fraction(3, 8)
    assert Options(selection="sequence_aware", min_tokens_ratio=0.9).most_slots == 1
    assert Options(scope="batch", max_selected=0.5).most_slots == Fraction(1, 2)
    assert Options(selection="labels", max_selected=7).most_slots == 7


def test_slots_with_context():
    assert Options(context=3).most_slots == Fraction(1, 4) and Options(context=3).most_gradient_slots == Fraction(1, 2)
    assert Options(context=3, min_tokens_ratio=0.7).most_gradient_slots == 1
    given = Options(context=3, max_selected=40)
    assert (given.most_slots, given.most_gradient_slots) == (Fraction(1, 4), 40)
    whole = Options(context=3, scope="batch", max_selected=0.5)
    assert whole.most_slots == whole.most_gradient_slots == Fraction(1, 2)
    labels = Options(selection="labels")
    assert labels.most_slots == labels.most_gradient_slots == Fraction(1, 4)


def test_context_means_nothing_where_the_gradient_is_exact():
    assert Options(selection="labels").context_rows == 128 and Options().context_rows == 0
    assert Options(selection="labels", context=5).context_rows == 5
    assert Options(selection="labels", gradient="exact").context_rows == 0
    assert Options(gradient="exact", context=0).context_rows == 0


def test_digest_covers_what_changes_the_graph():
    base = Options().digest()
    assert Options(min_tokens_ratio=0.5).digest() != base
    assert Options(kv_gradient="stop").digest() != base
    assert Options(scope="batch").digest() != base and Options(num_strata=5).digest() != base
    assert Options(dump_dir="x", fallback="silent", verify=3).digest() == base
    schedule = Options(warmup_steps=9, ladder=(0.5,), dynamic_threshold=True, threshold_sensitivity=0.1)
    schedule = dataclasses.replace(schedule, variance_bound=2.0, measure_every=3)
    assert schedule.digest() == base, "a rung is the graph of its ratio"


def test_every_field_is_documented():
    for field in dataclasses.fields(Options):
        assert f"{field.name}:" in (Options.__doc__ or ""), field.name
