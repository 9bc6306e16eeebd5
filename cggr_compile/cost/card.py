"""How long a step takes on a card that a few numbers describe."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sympy
import torch

from cggr_compile.cost.work import Kind, Work


@dataclass(frozen=True)
class Card:
    """A device.

    Attributes:
        name: as ``torch.cuda.get_device_name`` says it, or the part of it that tells the card.
        products: FLOP/s that large products of 16-bit numbers reach.
        attention: FLOP/s of attention, of which only the causal half is counted.
        bytes: bytes/s that kernels read and write.
        kernel: seconds in which a kernel starts and ends, and the card does little.
        launch: seconds of the host for a kernel, where no CUDA graph replays it.
    """

    name: str
    products: float
    attention: float
    bytes: float
    kernel: float
    launch: float

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.products / 1e12:.0f} TFLOP/s in products, {self.attention / 1e12:.0f} in attention, "
            f"{self.bytes / 1e12:.1f} TB/s, {self.kernel * 1e6:.1f} µs a kernel, {self.launch * 1e6:.1f} µs a launch"
        )


# what `benchmarks/cost_model.py` holds against measured steps; two thirds of the H200's 989 TFLOP/s and 4.8 TB/s
CARDS = (Card("H200", 6.6e14, 3.5e14, 3.2e12, 1e-6, 6e-6),)


def card_of(device: torch.device | str) -> Card | None:
    """The numbers of a device; None where they are not known."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(device)
    return next((card for card in CARDS if card.name in name), None)


def seconds(work: Work, card: Card, values: Mapping[sympy.Symbol, sympy.Expr], *, replayed: bool = False) -> float:
    """What one half of a step takes: its kernels one behind the other, or, where that is longer, their launches.

    Args:
        replayed: by a CUDA graph.
    """
    times, launches = 0.0, 0.0
    for kind in work.kinds:
        count = float(kind.count.xreplace(dict(values)))
        times += count * _kernel(kind, card, values)
        launches += count * card.launch
    return times if replayed else max(times, launches)


def _kernel(kind: Kind, card: Card, values: Mapping[sympy.Symbol, sympy.Expr]) -> float:
    rate = card.attention if kind.kind == "attention" else card.products
    flops = float(kind.flops.xreplace(dict(values))) * (0.5 if kind.causal else 1.0)
    return card.kernel + max(flops / rate, float(kind.bytes.xreplace(dict(values))) / card.bytes)
