"""What a runtime keeps of ``scoring="learned"``: the networks that predict difficulties, see ``cggr::predict``."""

from __future__ import annotations

import base64
import sys
from array import array
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cggr_compile.ops.predictor import SUMS, concentration, correlation, new_predictor, predictor_size
from cggr_compile.passes.step_interface import PredictorKey
from cggr_compile.predictor_exchange import PERIOD, PredictorExchange, mean_of
from cggr_compile.shared_readback import SharedReadback


class Predictors:
    """The predictors of one model, each as its last step has returned it."""

    def __init__(self) -> None:
        self._states: dict[PredictorKey, Tensor] = {}
        self._last: tuple[PredictorKey, ...] = ()  # those of the last step
        self._exchange: PredictorExchange | None = None

    def share(self, shared: Callable[..., SharedReadback]) -> SharedReadback:
        """Learn from the rows of all processes; returns what has to be advanced at every step."""
        found = shared("predictors", mean_of, period=PERIOD, offset=1)  # the first step is step 1 when it ends
        self._exchange = PredictorExchange(found)
        return found

    def get(self, key: PredictorKey, device: torch.device) -> Tensor:
        """float32 on ``device``; untrained at the first time, the same in every process."""
        state = self._states.get(key)
        if state is None or state.device != device:
            state = (new_predictor(key.features) if state is None else state).to(device)
            self._states[key] = state
        return state

    def update(self, states: Mapping[PredictorKey, Tensor]) -> None:
        """A training step has returned these."""
        self._states.update(states if self._exchange is None else self._exchange.after(states))
        self._last = tuple(states)

    def correlation(self) -> float | None:
        """Of predicted and true gradients, of the last steps; None if none has predicted. Waits for the device."""
        sums = self._sums()
        return None if sums is None else correlation(sums)

    def concentration(self) -> float | None:
        """Of the true gradients, of the last steps; None if none has predicted. Waits for the device."""
        sums = self._sums()
        return None if sums is None else concentration(sums)

    def _sums(self) -> Tensor | None:
        found = [self._states[key][:SUMS].detach().cpu() for key in self._last]
        return torch.stack(found).sum(0) if found else None

    def state_dict(self) -> dict[str, str]:
        """By their keys, as text: little-endian float32 in base64. Waits for the device."""
        return {str(key): _encoded(state) for key, state in self._states.items()}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Resume from :meth:`state_dict`.

        Raises:
            ValueError: if ``state`` is no such dict.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"state: predictors must be a dict, got {state!r}")
        keys = {PredictorKey.parse(text): text for text in state}
        self._states = {key: _decoded(key, state[text]) for key, text in keys.items()}
        self._last = ()


def _encoded(state: Tensor) -> str:
    return base64.b64encode(_little_endian(array("f", state.tolist())).tobytes()).decode("ascii")


def _decoded(key: PredictorKey, text: Any) -> Tensor:
    numbers = array("f")
    try:
        numbers.frombytes(base64.b64decode(text, validate=True))
    except (TypeError, ValueError) as error:
        raise ValueError(f"state: predictor {key} must be float32 numbers in base64: {error}") from error
    if len(numbers) != predictor_size(key.features):
        raise ValueError(
            f"state: predictor {key} must be {predictor_size(key.features)} numbers, there are {len(numbers)}"
        )
    return torch.tensor(_little_endian(numbers))


def _little_endian(numbers: array[float]) -> array[float]:
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers
