"""Sizes of tensors as products of named ones, told apart by where they come from and not by their values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import sympy


@dataclass(eq=False)
class Atom:
    """A factor of a size.

    Attributes:
        value: in the graph that was captured.
        names: what it is called by: axes of parameters, or "B", "S". Without a name it is a number.
        symbol: what a name stands for in expressions; without one, the first of its names.
        derived: gives its expression, where it is computed from others, which are its ``sources``.
        summands: the sizes that were put behind one another, if it is the sum of such.
    """

    value: int
    names: set[str] = field(default_factory=set)
    symbol: sympy.Symbol | None = None
    derived: Callable[[], sympy.Expr] | None = None
    sources: Size = ()
    summands: tuple[Size, ...] = ()
    same: Atom | None = None
    parts: Size | None = None

    @property
    def rank(self) -> int:
        """How much it says; of two that are one, the higher stays."""
        return 2 if self.names else 1 if self.derived is not None else 0


# A size in row-major order of its factors; () is one.
Size = tuple[Atom, ...]
Shape = tuple[Size, ...]


def symbol(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, positive=True)


def number(value: int) -> Size:
    """A size of which nothing is known but its value."""
    return () if value == 1 else (Atom(value),)


def value_of(size: Size) -> int:
    return math.prod(atom.value for atom in size)


def resolve(size: Size) -> Size:
    """The same in factors that are neither another one nor divided."""
    found: list[Atom] = []
    for atom in size:
        if atom.same is not None:
            found += resolve((atom.same,))
        elif atom.parts is not None:
            found += resolve(atom.parts)
        else:
            found.append(atom)
    return tuple(found)


def unify(one: Size, other: Size) -> None:
    """Two sizes are the same: so are their factors, in order; a factor of one may have to be divided for that."""
    left, right = list(resolve(one)), list(resolve(other))
    if value_of(tuple(left)) != value_of(tuple(right)):
        return
    while left and right:
        a, b = left.pop(0), right.pop(0)
        if a is b:
            continue
        if a.value == b.value:
            weak, strong = sorted((a, b), key=lambda atom: atom.rank)
            if _depends(strong, weak):
                weak, strong = strong, weak
            if not _depends(strong, weak):
                weak.same, strong.names = strong, strong.names | weak.names
        elif 1 in (a.value, b.value):  # a batch of one
            (left if b.value == 1 else right).insert(0, a if b.value == 1 else b)
        elif a.value % b.value == 0:
            left.insert(0, _divide(a, b))
        elif b.value % a.value == 0:
            right.insert(0, _divide(b, a))
        else:
            return
        left, right = list(resolve(tuple(left))), list(resolve(tuple(right)))


def split(size: Size, values: Sequence[int]) -> list[Size] | None:
    """The size as a product of these; None where they divide it in another way."""
    left, found = list(resolve(size)), list[Size]()
    for i, value in enumerate(values):
        if i == len(values) - 1:
            found.append(tuple(left))
            break
        part, rest = list[Atom](), value
        while rest > 1 and left:
            atom = left.pop(0)
            if rest % atom.value == 0:
                part.append(atom)
                rest //= atom.value
            elif atom.value % rest == 0:
                behind = Atom(atom.value // rest)
                front = _quotient(atom, behind)
                atom.parts = (front, behind)
                part.append(front)
                left.insert(0, behind)
                rest = 1
            else:
                return None
        ones = list(takewhile(lambda atom: atom.value == 1, left)) if value == 1 else []
        found.append((*part, *ones))
        left = left[len(ones) :]
    return found if [value_of(size) for size in found] == list(values) else None


def shifted(size: Size, value: int) -> Size:
    """A size that differs by a number from another one, as that of a slice behind the first position."""
    difference = value - value_of(size)
    return (Atom(value, derived=lambda: expression(size) + difference, sources=size),) if difference else size


def total(sizes: Sequence[Size]) -> Size:
    """The sum of sizes."""
    sources = tuple(atom for size in sizes for atom in size)
    formula, value = lambda: sympy.Add(*map(expression, sizes)), sum(map(value_of, sizes))
    return (Atom(value, derived=formula, sources=sources, summands=tuple(sizes)),)


def cut(size: Size, start: int, value: int) -> Size | None:
    """A part of a sum of sizes, if it is one of them."""
    summands, at = next((atom.summands for atom in size if len(size) == 1), ()), 0
    for one in summands:
        if (at, value_of(one)) == (start, value):
            return one
        at += value_of(one)
    return None


def own(atom: Atom) -> sympy.Expr:
    """The expression of one factor, divided or not."""
    if atom.symbol is not None:
        return atom.symbol
    if atom.names:
        return symbol(min(atom.names))
    return atom.derived() if atom.derived is not None else sympy.Integer(atom.value)


def expression(size: Size) -> sympy.Expr:
    """The product of the factors, in symbols of their names."""
    return sympy.Mul(*map(own, resolve(size)))


def _divide(whole: Atom, front: Atom) -> Atom:
    """``whole`` begins with ``front``; returns what is behind it."""
    behind = _quotient(whole, front)
    whole.parts = (front, behind)
    return behind


def _quotient(whole: Atom, part: Atom) -> Atom:
    if whole.rank == 0:
        return Atom(whole.value // part.value)
    # what the whole is called, or computed from, stays with it when it is divided
    sources = (part, *whole.sources)
    return Atom(whole.value // part.value, derived=lambda: own(whole) / expression((part,)), sources=sources)


def _depends(atom: Atom, on: Atom) -> bool:
    """Whether the expression of one contains the other."""
    return not atom.names and any(leaf is on or _depends(leaf, on) for leaf in resolve(atom.sources))
