"""What the processes of one training have measured, told to each other where they decide something, and only there.

Processes that decide alike run alike: none waits, at every gradient reduction, for one that keeps more tokens. What
they tell each other goes through the store in which ``torch.distributed`` has met, and not through collectives: a
process that does not come to a decision (its batches have ended, Dynamo has given up on its code) must not stop the
others. So nobody waits for longer than ``PATIENCE``, and where one is missing every process decides for itself from
then on. That is as right, only less even.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed

log = logging.getLogger(__name__)
# seconds; one process may compile a shape that the others do not have
PATIENCE = 120.0
_POLL = 0.002  # seconds
_LEFT = "left"  # the key that ends it for all


class Agreement:
    """Decisions of one model's processes: each posts a value, the first of them combines these, all take the result.

    Values are what JSON holds. Every topic is counted by itself: the n-th post of one process belongs to the n-th of
    every other.

    Args:
        store: where ``torch.distributed`` has met.
        ranks: the processes, by their global ranks; the first one combines.
        rank: of this process. name: of the model, the same in all processes.

    Attributes:
        alone: whether every process decides for itself.
    """

    def __init__(self, store: Any, ranks: Sequence[int], rank: int, name: str) -> None:
        self._store: Any = torch.distributed.PrefixStore(f"cggr/{name}", store)
        self.ranks, self._rank = tuple(ranks), rank
        self._posted: Counter[str] = Counter()
        self.alone = len(self.ranks) < 2

    def decide(self, topic: str, value: Any, combine: Callable[[list[Any]], Any]) -> Any:
        """All three steps at once: waits for the others. None if they do not come.

        Args:
            combine: gives the result, from the values in the order of ``ranks``.
        """
        number = self.post(topic, value)
        self.combine(topic, number, combine)
        return self.take(topic, number)

    def post(self, topic: str, value: Any) -> int:
        """Tell the others; returns which decision of this topic it is for."""
        self._posted[topic] += 1
        number = self._posted[topic]
        self._set(f"{topic}/{number}/{self._rank}", value)
        return number

    def combine(self, topic: str, number: int, how: Callable[[list[Any]], Any]) -> None:
        """In the first process: wait for what all have posted, and tell them the result."""
        if self._rank != self.ranks[0] or self.alone:
            return
        keys = [f"{topic}/{number}/{rank}" for rank in self.ranks]
        values = self._get(keys)
        if values is None:
            return
        self._set(f"{topic}/{number}", how(values))
        self._forget([*keys, f"{topic}/{number - 1}"])  # nobody posts for this one who has not taken that

    def take(self, topic: str, number: int) -> Any:
        """The result; None if there is none. Waits for it."""
        found = self._get([f"{topic}/{number}"])
        return None if found is None else found[0]

    def leave(self, why: str) -> None:
        """Nothing is decided together any more, by any process."""
        if not self.alone:
            self._end(why)
            self._set(_LEFT, why, always=True)

    def _end(self, why: str) -> None:
        self.alone = True
        log.warning("from here on every process decides for itself about ratios and slots: %s", why)

    def _set(self, key: str, value: Any, *, always: bool = False) -> None:
        if self.alone and not always:
            return
        try:
            self._store.set(key, json.dumps(value))
        except RuntimeError as error:  # the process that holds the store is gone
            self.alone = True
            log.info("the store of torch.distributed does not answer: %s", error)

    def _get(self, keys: list[str]) -> list[Any] | None:
        """What there is under all of these; None if something is missing."""
        end = time.monotonic() + PATIENCE
        while not self.alone:
            try:
                if self._store.check([_LEFT]):
                    self._end(json.loads(self._store.get(_LEFT)))
                elif self._store.check(keys):
                    return [json.loads(text) for text in self._texts(keys)]
            except RuntimeError as error:
                self._end(f"the store of torch.distributed does not answer: {error}")
            if time.monotonic() > end:
                self.leave(f"rank {self._rank} has waited for {PATIENCE:.0f} seconds for others, for {keys[0]!r}")
            time.sleep(_POLL)
        return None

    def _texts(self, keys: list[str]) -> list[bytes]:
        if self._store.has_extended_api():
            texts: list[bytes] = self._store.multi_get(keys)
            return texts
        return [self._store.get(key) for key in keys]

    def _forget(self, keys: Sequence[str]) -> None:
        try:
            for key in keys:
                self._store.delete_key(key)
        except RuntimeError:  # a store that keeps everything
            pass
