"""Symbols for the sizes of a model: axes of parameters that are one size have one, and so do those of alike layers."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cggr_compile.cost.blocks import block_of
from cggr_compile.cost.sizes import Atom, Shape, symbol

# how many names of a parameter's path say what it is: ``mlp.up_proj.weight``
_SUFFIX = 3
_LETTERS = (
    ("R", re.compile(r"lora|adapter")),
    ("A_kv", re.compile(r"(^|[._])(k|v|key|value)(_proj|$|[._])")),
    ("A", re.compile(r"(^|[._])(q|o|query|qkv|c_attn|query_key_value|out)(_proj|$|[._])|attention|attn")),
    ("E", re.compile(r"experts.*\[0\]|router|gate\.weight\[0\]")),
    ("F", re.compile(r"mlp|ffn|feed_forward|up|down|gate|fc|dense|experts|w[123]|c_fc")),
)


@dataclass(frozen=True)
class Role:
    """A symbol, its value in the model, and an axis of a parameter that has this size."""

    value: int
    axis: str


def axes(name: str, sizes: Iterable[int]) -> Shape:
    """The sizes of a parameter, each with a name of its own: ``layers.0.mlp.up_proj.weight[0]``."""
    return tuple((Atom(size, {f"{name}[{axis}]"}),) for axis, size in enumerate(sizes))


def name_roles(parameters: Mapping[str, Shape], table: str | None) -> dict[str, Role]:
    """Give every size of a parameter a symbol of its role.

    Args:
        parameters: their sizes, by name, after everything that is known of them was unified.
        table: the parameter that tokens are looked up in; its first axis is the vocabulary.

    Returns:
        what each symbol stands for; see :func:`short_names`.
    """
    found, vocabulary = dict[str, Role](), set[int]()
    if table is not None:
        outside = {name: shape for name, shape in parameters.items() if not block_of(name)}
        alike = [shape for shape in outside.values() if _values(shape) == _values(parameters[table])]
        vocabulary = {id(_leaf(shape[0][0])) for shape in alike}
    groups = _groups([size[0] for shape in parameters.values() for size in shape])
    hidden = max(groups, key=lambda group: len({name for atom in group for name in atom.names}), default=None)
    for group in groups:
        names = sorted({name for atom in group for name in atom.names})
        if any(id(atom) in vocabulary for atom in group):
            text = "V"
        else:
            text = ("H " if group is hidden else f"{_letter(names)} ") + names[0]
        found.setdefault(text, Role(group[0].value, names[0]))
        for atom in group:
            atom.symbol = symbol(text)
    return found


def short_names(roles: Mapping[str, Role]) -> dict[str, str]:
    """Of symbols that are used: a letter for each, with a number where there are several, the largest size first."""
    found, letters = dict[str, str](), Counter[str]()
    for text in sorted(roles, key=lambda text: (-roles[text].value, text)):
        letter = text.split(" ")[0]
        letters[letter] += 1
        found[text] = letter if letters[letter] == 1 else f"{letter}{letters[letter]}"
    return found


def _groups(seeds: list[Atom]) -> list[list[Atom]]:
    """Atoms of one role: those that share a name but for the layer's number, and their value; and groups of such whose
    names end alike, as the ranks of adapters on several layers."""
    leaves = list({id(leaf): leaf for atom in seeds for leaf in (_leaf(atom),)}.values())
    places: dict[tuple[str, int], list[Atom]] = {}
    for leaf in leaves:
        found = [leaf]
        for place in {(_without_numbers(name), leaf.value) for name in leaf.names}:
            if (others := places.get(place)) is not None and others is not found:
                others += [atom for atom in found if not any(atom is other for other in others)]
                places.update({key: others for key, group in places.items() if group is found})
                found = others
            places[place] = found
    groups: dict[tuple[frozenset[str], int], list[Atom]] = defaultdict(list)
    for group in {id(group): group for group in places.values()}.values():
        ends = frozenset(_suffix(name) for atom in group for name in atom.names)
        groups[ends, group[0].value] += group
    return list(groups.values())


def _leaf(atom: Atom) -> Atom:
    while atom.same is not None:
        atom = atom.same
    return atom


def _without_numbers(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdigit())


def _suffix(name: str) -> str:
    return ".".join(_without_numbers(name).split(".")[-_SUFFIX:])


def _letter(names: list[str]) -> str:
    """That of a pattern which all of the names have, or else one of them."""
    for holds in (all, any):
        for letter, pattern in _LETTERS[holds is any :]:
            if holds(pattern.search(_suffix(name)) for name in names):
                return letter
    return "N"


def _values(shape: Shape) -> list[int]:
    return [size[0].value for size in shape]
