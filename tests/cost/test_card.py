"""Times from a card's numbers, and how expressions are shown."""

from __future__ import annotations

import pytest
import sympy

from cggr_compile.cost.card import Card, card_of, seconds
from cggr_compile.cost.text import leading, quantity
from cggr_compile.cost.work import Kind, Work, per_layer

L, S = sympy.symbols("L S", positive=True)
CARD = Card("H1", products=1e12, attention=5e11, bytes=1e9, kernel=1e-6, launch=2e-6)


def work(*kinds):
    return Work(tuple(Kind(*kind) for kind in kinds), 0.0)


def test_a_kernel_takes_what_limits_it():
    values = {L: sympy.Integer(2), S: sympy.Integer(1000)}
    half = work(
        (L, "product", False, 1e9 * S, sympy.Integer(8)),  # 1 s
        (sympy.Integer(1), "attention", True, 1e9 * S, sympy.Integer(8)),  # half of the square, at half the rate: 1 s
        (sympy.Integer(1), "other", False, sympy.Integer(0), 1e6 * S),  # 1 s
        (100 * L, "other", False, sympy.Integer(0), sympy.Integer(8)),  # nothing to do: 1 µs each
    )
    assert seconds(half, CARD, values, replayed=True) == pytest.approx(4.0002056)
    few = work((100 * L, "other", False, sympy.Integer(0), sympy.Integer(8)))
    assert seconds(few, CARD, values) == pytest.approx(400e-6)  # the host launches them
    assert seconds(few, CARD, values, replayed=True) == pytest.approx(201.6e-6)


def test_unknown_devices_have_no_card():
    assert card_of("cpu") is None


def test_counts_per_layer():
    layers = [f"h.{i}" for i in range(5)]
    assert per_layer(dict.fromkeys(layers, 3), layers) == 3 * L
    assert per_layer({**dict.fromkeys(layers, 3), "h.4": 1, "": 2}, layers) == 3 * L
    assert per_layer({"h.0": 1}, layers) == 1
    assert per_layer({"h.1": 1, "h.3": 1}, layers).xreplace({L: 5}) == 2
    assert per_layer({"": 4}, []) == 4


def test_small_terms_are_left_out():
    values = {S: sympy.Integer(1000), L: sympy.Integer(10)}
    assert leading(2 * S * L + 4 * S**2 * L + 3, values, 0.01) == "4·L·S^2 + …"
    assert leading(2 * S * L + 4 * S**2 * L + 3, values, 1e-6) == "2·L·S·(2·S + 1) + …"
    assert leading(2 * S, values, 0.01) == "2·S"
    assert (quantity(1.234e12, "FLOP"), quantity(5.0, "B")) == ("1.23 TFLOP", "5 B")
