"""The cost of a training step as people read it: what matters of each expression, its value, selective beside dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sympy

if TYPE_CHECKING:
    from cggr_compile.cost.step import Cost, Step

# what is left out of an expression that is shown, as a share of it
_LEFT_OUT = {"FLOP": 0.01, "B": 0.1}
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Line:
    """A quantity.

    Attributes:
        name: "forward", "backward", "kept for the backward". unit: "FLOP" or "B", of bytes.
        dense, selective: the value, with its unit. dense_form, selective_form: the expression, its largest terms.
        ratio: selective over dense. Where the step stays dense the selective ones are empty, and there is none.
    """

    name: str
    unit: str
    dense: str
    dense_form: str
    selective: str = ""
    selective_form: str = ""
    ratio: float | None = None


def lines(cost: Cost) -> list[Line]:
    """FLOPs and bytes of both halves, and what is kept in between."""
    found = []
    for name, unit, of in (
        ("forward", "FLOP", lambda step: step.forward.flops),
        ("backward", "FLOP", lambda step: step.backward.flops),
        ("forward", "B", lambda step: step.forward.bytes),
        ("backward", "B", lambda step: step.backward.bytes),
        ("kept for the backward", "B", lambda step: step.memory),
    ):
        value, form = _shown(cost, of(cost.dense), unit)
        if cost.selective is None:
            found.append(Line(name, unit, quantity(value, unit), form))
            continue
        other, other_form = _shown(cost, of(cost.selective), unit)
        ratio = other / value if value else None
        found.append(Line(name, unit, quantity(value, unit), form, quantity(other, unit), other_form, ratio))
    return found


def legend(cost: Cost) -> list[str]:
    """What the symbols are: ``B = 4: sequences``."""
    meaning = {
        "B": "sequences",
        "S": "positions of each",
        "L": "layers",
        "rho": "share of the positions with loss" + ("" if "r" in cost.values else ", and with gradient"),
        "r": "share of the positions with gradient",
    }
    meaning |= {name: role.axis for name, role in cost.roles.items()}
    return [f"{name} = {value}: {meaning[name]}" for name, value in cost.values.items()]


def times(cost: Cost) -> str:
    """What the step takes on the card that the model is on, predicted; empty where the card is not known."""
    from cggr_compile.cost.card import card_of, seconds

    card = card_of(cost.device)
    if card is None:
        return ""
    values = cost.substitution()

    def step_time(step: Step) -> float:
        return sum(seconds(half, card, values) for half in (step.forward, step.backward))

    dense = step_time(cost.dense)
    text = f"predicted: dense {1e3 * dense:.1f} ms"
    if cost.selective is not None:
        ours = step_time(cost.selective)
        text += f", selective {1e3 * ours:.1f} ms, {dense / ours:.2f} times faster"
    return f"{text} ({card})"


def text(cost: Cost) -> str:
    """All of it, as lines."""
    found = ["cost of a training step", *(f"  {one}" for one in legend(cost))]
    for line in lines(cost):
        kind = "FLOPs" if line.unit == "FLOP" else "bytes"
        ratio = "" if line.ratio is None else f", selective {line.selective}, {line.ratio:.2f} of it"
        found += [f"{line.name}, {kind}: dense {line.dense}{ratio}", f"  dense      {line.dense_form}"]
        found += [f"  selective  {line.selective_form}"] if line.selective_form else []
    found += [told] if (told := times(cost)) else []
    return "\n".join(found)


def quantity(value: float, unit: str) -> str:
    """``1.2 TFLOP``."""
    factor, prefix = next((pair for pair in _PREFIXES if value >= pair[0]), (1.0, ""))
    return f"{value / factor:.3g} {prefix}{unit}"


def leading(expression: sympy.Expr, values: dict[sympy.Symbol, sympy.Expr], left_out: float) -> str:
    """The largest terms, common factors taken out, until what is left out is a small share."""
    terms = list(sympy.Add.make_args(sympy.expand(expression)))
    sizes = {term: float(term.xreplace(values)) for term in terms}
    total, rest = sum(sizes.values()), sum(abs(size) for size in sizes.values())
    kept = []
    for term in sorted(terms, key=lambda term: (-abs(sizes[term]), str(term))):
        if rest <= left_out * abs(total):
            break
        kept.append(term)
        rest -= abs(sizes[term])
    shown = str(sympy.factor_terms(sympy.Add(*kept))).replace("**", "^").replace("*", "·")
    return shown + (" + …" if len(kept) < len(terms) else "")


def _shown(cost: Cost, expression: sympy.Expr, unit: str) -> tuple[float, str]:
    return cost.at(expression), leading(expression, cost.substitution(), _LEFT_OUT[unit])
