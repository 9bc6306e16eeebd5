"""What one half of a training step does: kernels that are alike, counted, in symbols."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy

from cggr_compile.cost.kernels import Kernel
from cggr_compile.cost.sizes import symbol

LAYERS = symbol("L")


@dataclass(frozen=True)
class Kind:
    """Kernels that compute the same on other values.

    Attributes:
        count: how many there are, in the number of layers L.
        kind: "product", "attention" or "other". causal: whether about half of the FLOPs are not computed.
        flops, bytes: of one.
    """

    count: sympy.Expr
    kind: str
    causal: bool
    flops: sympy.Expr
    bytes: sympy.Expr


@dataclass(frozen=True)
class Work:
    """Kernels of one half of a training step.

    Attributes:
        kinds: of kernels.
        numbers: how many FLOPs have a number that the sizes do not explain, as a share.
    """

    kinds: tuple[Kind, ...]
    numbers: float

    def renamed(self, names: Mapping[sympy.Symbol, sympy.Symbol]) -> Work:
        """The same in other symbols."""
        kinds = (replace(k, flops=k.flops.xreplace(names), bytes=k.bytes.xreplace(names)) for k in self.kinds)
        return replace(self, kinds=tuple(kinds))

    @property
    def symbols(self) -> set[sympy.Symbol]:
        forms = (form for kind in self.kinds for form in (kind.count, kind.flops, kind.bytes))
        return {one for form in forms for one in form.free_symbols}

    @property
    def flops(self) -> sympy.Expr:
        return sympy.Add(*(kind.count * kind.flops for kind in self.kinds))

    @property
    def bytes(self) -> sympy.Expr:
        """That kernels read and write."""
        return sympy.Add(*(kind.count * kind.bytes for kind in self.kinds))

    @property
    def launches(self) -> sympy.Expr:
        return sympy.Add(*(kind.count for kind in self.kinds))


def work_of(kernels: Iterable[Kernel], layers: list[str], values: Mapping[sympy.Symbol, int]) -> Work:
    """Count kernels.

    Args:
        layers: the paths of the model's blocks.
        values: of the symbols in the capture. A form that does not come to the number is taken for the number.
    """
    checked: dict[tuple[sympy.Expr, int], sympy.Expr] = {}
    alike: dict[Any, Counter[str]] = defaultdict(Counter)
    total, unexplained = 0, 0
    for kernel in kernels:
        forms = []
        for form, value in ((kernel.flops_form, kernel.flops), (kernel.bytes_form, kernel.bytes)):
            if (form, value) not in checked:
                checked[form, value] = form if form.xreplace(values) == value else sympy.Integer(value)
            forms.append(checked[form, value])
        total += kernel.flops
        unexplained += kernel.flops if forms[0] != kernel.flops_form or not forms[0].free_symbols else 0
        alike[kernel.kind, kernel.causal, *forms][kernel.block] += 1
    kinds = [Kind(per_layer(counts, layers), *key) for key, counts in alike.items()]
    return Work(tuple(kinds), unexplained / total if total else 0.0)


def per_layer(counts: Mapping[str, int], layers: list[str]) -> sympy.Expr:
    """How often something occurs: in a layer on the average, not counting the first and the last one, which may
    differ; and so much more or less often in all."""
    if not layers:
        return sympy.Integer(sum(counts.values()))
    inner = layers[1:-1] or layers[:1]
    usual = sympy.Rational(sum(counts.get(layer, 0) for layer in inner), len(inner))
    return usual * LAYERS + sum(counts.values()) - usual * len(layers)
