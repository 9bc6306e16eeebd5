"""Expressions of one model, evaluated at the sizes of another one: FlopCounterMode counts the same there."""

from __future__ import annotations

import re

import models
import pytest
import stackless
import sympy
from cost.counting import batch_of, captured, executed, predicted

import cggr_compile
from cggr_compile.cost import card
from cggr_compile.cost.step import count
from cggr_compile.cost.text import quantity

# sizes of a model and of a batch that are the same number, though they have nothing to do with one another
ALIKE = dict(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, vocab_size=64)
OTHER = dict(hidden_size=48, num_attention_heads=8, num_key_value_heads=4, intermediate_size=72, vocab_size=112)
DEPTHS = 2, 3


def agree(first, second, batches, **options):
    """Count two models; the expressions of the first are what FlopCounterMode counts of the second."""
    cost, graphs = count(captured(first, batches[0], **options)), captured(second, batches[1], **options)
    assert predicted(cost, count(graphs)) == executed(graphs)
    return cost


def test_sizes_that_are_the_same_number_stay_apart():
    first, second = (
        models.family("llama", head_dim=8, num_hidden_layers=layers, **sizes)
        for sizes, layers in zip((ALIKE, OTHER), DEPTHS, strict=True)
    )
    # S = 8 is a head's size, B = 2 are the heads of keys, F = 64 is V, H = 32 the heads' width, 2 rows a batch's size
    cost = agree(first, second, (batch_of(2, 8), batch_of(3, 20)), selection="importance")
    assert {name: int(cost.values[name]) for name in ("B", "S", "L", "H", "A", "A_kv", "F", "V")} == {
        "B": 2,
        "S": 8,
        "L": 2,
        "H": 32,
        "A": 32,
        "A_kv": 16,
        "F": 64,
        "V": 64,
    }
    names = "B S L H A A_kv F V rho"
    b, s, layers, h, a, kv, f, v, rho = (sympy.Symbol(name, positive=True) for name in names.split())
    dense = 2 * b * s * (layers * (2 * a * h + 2 * kv * h + 3 * f * h + 2 * a * s) + h * v)
    assert sympy.expand(cost.dense.forward.flops - dense) == 0
    rows = 2 * b * s * rho * (layers * (4 * a * h + 2 * kv * h + 6 * f * h + 7 * a * s) + 2 * h * v)
    every = 4 * b * s * layers * kv * h  # weights of keys and values learn from every position
    assert sympy.expand(cost.selective.backward.flops - rows - every) == 0


def test_one_sequence():
    first, second = (models.family("llama", head_dim=8, num_hidden_layers=1, **sizes) for sizes in (ALIKE, OTHER))
    cost = agree(first, second, (batch_of(1, 8), batch_of(1, 20)), selection="importance")
    with pytest.raises(ValueError, match="B"):
        cost.at(cost.dense.flops, B=2)


def test_a_step_that_takes_a_predictor():
    cost = count(captured(models.family("llama", num_hidden_layers=1), batch_of(2, 16), scoring="learned"))
    assert cost.at(cost.selective.backward.flops) < cost.at(cost.dense.backward.flops) / 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt2", "gemma3", "gpt_oss"])
def test_families(name):
    first, second = (models.family(name, **_sizes(name)) for _ in range(2))
    cost = agree(first, second, (batch_of(2, 16), batch_of(3, 24)))
    assert cost.selective.forward.numbers == cost.selective.backward.numbers == 0


def _sizes(name):
    return {} if name == "gpt2" else {"num_hidden_layers": 2}


@pytest.fixture(scope="module")
def plain():
    """One layer; its graphs are counted, and not changed."""
    return captured(models.PlainLM(), batch_of(2, 16), selection="importance", context=2)


def test_rows_with_loss_and_rows_with_gradient(plain):
    cost = count(plain)
    assert predicted(cost, cost) == executed(plain)
    assert (cost.values["rho"], cost.values["r"]) == (sympy.Rational(1, 4), sympy.Rational(1, 2))
    rho, r, head = *sympy.symbols("rho r", positive=True), sympy.Symbol("V", positive=True)
    flops = sympy.expand(cost.selective.backward.flops)
    assert flops.coeff(head).has(rho) and not flops.coeff(head).has(r)  # the head's product is of the rows with loss
    assert flops.coeff(head, 0).has(r) and not flops.coeff(head, 0).has(rho)


@pytest.mark.slow
def test_adapters():
    peft = pytest.importorskip("peft")

    def adapted(layers, rank):
        config = peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
        return peft.get_peft_model(models.family("llama", num_hidden_layers=layers), config).get_base_model()

    cost = agree(adapted(3, 3), adapted(4, 5), (batch_of(2, 16), batch_of(3, 24)))
    assert [name for name in cost.roles if name.startswith("R")] == ["R"] and cost.values["R"] == 3
    # weights that are not trained have no gradient: a product less
    assert cost.at(cost.dense.backward.flops) < 1.7 * cost.at(cost.dense.forward.flops)


def test_no_stack_of_layers():
    model, batch, _ = stackless.make("convolution")
    graphs = captured(model, batch)
    cost, own = count(graphs), executed(graphs)
    assert predicted(cost, cost) == own
    assert "rho" in cost.values and own["selective"][1] < own["dense"][1]


def test_memory_is_what_the_forward_keeps(plain):
    cost = count(plain)
    assert 0 < cost.at(cost.selective.memory) < 0.6 * cost.at(cost.dense.memory)
    # of the dense step everything is kept of every position
    assert cost.at(cost.dense.memory, B=4) == pytest.approx(2 * cost.at(cost.dense.memory), rel=0.01)


def test_a_graph_that_stays_dense():
    graphs = captured(models.PlainLM(), batch_of(2, 16), min_tokens_ratio=1.0)
    cost = count(graphs)
    assert cost.selective is None and predicted(cost, cost) == executed(graphs)
    with pytest.raises(ValueError, match="rho must be one of B, S"):
        cost.at(cost.dense.flops, rho=0.5)


@pytest.mark.parametrize("compile_first", models.slow_but([True], [True, False]))
def test_explain(compile_first, tmp_path):
    model, batch = models.PlainLM(), batch_of(2, 16)
    if compile_first:
        models.compiled(model, min_tokens_ratio=0.5)
    explanation = cggr_compile.explain(model, **batch, options=None if compile_first else {"min_tokens_ratio": 0.5})
    cost = explanation.cost
    assert cost is explanation.cost and cost.values["rho"] == sympy.Rational(1, 2)
    text = str(cost)
    assert "rho = 1/2: share of the positions with loss, and with gradient" in text
    assert re.search(r"^backward, FLOPs: dense .* [kM]FLOP, selective .* [kM]FLOP, 0\.\d\d of it$", text, re.MULTILINE)
    assert "predicted" not in text  # of a CPU no rates are known
    page = explanation.to_html(tmp_path / "page.html").read_text()
    assert "Cost of a training step" in page and quantity(cost.at(cost.dense.memory), "B") in page
    assert model.training and all(p.grad is None for p in model.parameters())


def test_explain_of_what_does_not_train():
    model, batch = models.PlainLM().eval(), batch_of(2, 16)
    assert cggr_compile.explain(model, **batch).cost is None


def test_predicted_on_a_card(plain, monkeypatch):
    cost = count(plain)
    monkeypatch.setattr(card, "card_of", lambda device: card.CARDS[0])
    assert re.search(r"predicted: dense .* ms, selective .* ms, .* times faster \(H200: 660 TFLOP/s", str(cost))
