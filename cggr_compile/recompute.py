"""A forward that is run again in the backward pass, by ``torch.utils.checkpoint``, is the same forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cggr_compile import compat
from cggr_compile.call import Call, Drawn, ObservedCall, Unrecorded
from cggr_compile.options import Options
from cggr_compile.passes.step_interface import PredictorKey
from cggr_compile.runtime import Runtime

_T = TypeVar("_T")
# for every checkpoint whose backward is to come, what each model was given inside of it, call by call
_forwards: WeakKeyDictionary[Any, dict[Runtime, list[Drawn]]] = WeakKeyDictionary()
# for every recomputation under way, known by its pack function, how many calls of each model it has repeated
_repeated: WeakKeyDictionary[Any, Counter[Runtime]] = WeakKeyDictionary()


class RepeatedCall(Unrecorded):
    """A recomputation: it takes the ratio, the slots and the selection of the forward that it repeats.

    Each method raises a RuntimeError where that forward is unknown: another graph, or none of this backend, ran it.
    """

    repeats = True

    def __init__(self, runtime: Runtime, drawn: Drawn) -> None:
        super().__init__(runtime)
        self.drawn = drawn

    def ratio(self, options: Options) -> float:
        return _known(self.drawn.ratio)

    def growth(self) -> int:
        return _known(self.drawn.growth)

    def state(self, device: torch.device) -> Tensor:
        return _known(self.drawn.state)

    def predictors(self, keys: Sequence[PredictorKey], device: torch.device) -> tuple[Tensor, ...]:
        return _known(self.drawn.predictors)


def call_of(runtime: Runtime) -> Call:
    """The call that begins now: a new forward, one that is observed, or the recomputation of an earlier one.

    Which forward is recomputed follows from the saved-tensors hooks in force. Those of a checkpoint, in its forward and
    in its recomputation, hold the same object; the calls inside of it are repeated in their order.
    """
    call = ObservedCall(runtime) if runtime.is_observed else Call(runtime)
    if not compat.under_saved_tensors_hooks():
        return call
    around = []  # checkpoints inside the recomputation, which are in their own forward
    for pack in compat.saved_tensors_packers():
        if (found := compat.checkpoint_of(pack)) is None:
            continue
        checkpoint, recomputes = found
        if recomputes:
            counts = _repeated.setdefault(pack, Counter())
            forwards = _forwards.get(checkpoint, {}).get(runtime, [])[counts[runtime] :]
            counts[runtime] += 1
            call = RepeatedCall(runtime, forwards[0] if forwards else Drawn())
            break
        around.append(checkpoint)
    for checkpoint in around:
        _forwards.setdefault(checkpoint, {}).setdefault(runtime, []).append(call.drawn)
    return call


def _known(drawn: _T | None) -> _T:
    if drawn is None:
        raise RuntimeError(
            "torch.utils.checkpoint recomputes a forward that another graph computed, or none of the backend cggr: "
            "its selection is not known. Was the model compiled, or compiled anew, between forward and backward?"
        )
    return drawn
