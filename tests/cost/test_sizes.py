"""Sizes are told apart by where they come from; numbers that are equal are not the same size."""

from __future__ import annotations

import sympy

from cggr_compile.cost.roles import axes, name_roles
from cggr_compile.cost.sizes import Atom, cut, expression, number, shifted, split, total, unify, value_of


def named(**values):
    return [(Atom(value, {name}),) for name, value in values.items()]


def symbols(names):
    return sympy.symbols(names, positive=True)


def test_a_number_becomes_what_it_is_unified_with():
    (length,), unknown, other = named(S=8), number(8), number(8)
    unify(unknown, length)
    assert expression(unknown) == symbols("S") and expression(other) == 8
    unify(unknown, number(9))  # another size: nothing is learned
    assert expression(unknown) == symbols("S")


def test_factors_in_order():
    batch, length = named(B=4, S=4)
    flat = number(16)
    unify(flat, (*batch, *length))
    assert expression(flat) == symbols("B") * symbols("S")
    first, second = split(flat, [4, 4])
    assert (expression(first), expression(second)) == (symbols("B"), symbols("S"))
    assert split(flat, [3, 5]) is None


def test_heads_of_a_width():
    (width,), (other,) = named(A=32), named(O=32)
    heads, size = split(width, [4, 8])
    assert expression(heads) == symbols("A") / 8 and expression(size) == 8
    unify((*heads, *size), other)  # the output projection takes heads times size
    assert expression(other) == expression(width) == symbols("A")


def test_groups_of_heads():
    queries, keys = named(A=32, K=16)
    heads, size = split(queries, [4, 8])
    key_heads, key_size = split(keys, [2, 8])
    unify(size, key_size)
    unify(heads, (*key_heads, *number(2)))  # every key head for two query heads
    assert sympy.simplify(expression((*heads, *size)) - symbols("A")) == 0
    assert expression((*key_heads, *key_size)) == symbols("K")


def test_an_expression_never_contains_itself():
    (width,), (other,) = named(A=32), named(O=32)
    heads, size = split(width, [4, 8])
    unify(heads, split(other, [4, 8])[0])
    unify(size, split(other, [4, 8])[1])
    assert expression(width).free_symbols <= set(symbols("A O"))
    assert expression(width).xreplace({symbols("A"): 32, symbols("O"): 32}) == 32


def test_sums_and_their_parts():
    gate, up, length = named(F=6, G=6, S=5)
    both = total([gate, up])
    assert value_of(both) == 12 and expression(both) == symbols("F") + symbols("G")
    assert cut(both, 6, 6) is up and cut(both, 3, 6) is None
    assert expression(shifted(length, 4)) == symbols("S") - 1 and shifted(length, 5) is length


def test_roles_of_layers():
    parameters = {f"layers.{i}.mlp.up.weight": axes(f"layers.{i}.mlp.up.weight", (6, 4)) for i in range(2)}
    parameters |= {"embed.weight": axes("embed.weight", (6, 4)), "head.weight": axes("head.weight", (6, 4))}
    for shape in parameters.values():
        unify(shape[1], parameters["embed.weight"][1])
    roles = name_roles(parameters, "embed.weight")
    assert sorted(text.split(" ")[0] for text in roles) == ["F", "H", "V"]  # up's and the head's 6 are two sizes
    first, second = (parameters[f"layers.{i}.mlp.up.weight"] for i in range(2))
    assert expression(first[0]) == expression(second[0]) != expression(parameters["head.weight"][0])
