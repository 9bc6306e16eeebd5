"""Processes decide together at fixed steps, and none waits for one that does not come. Here they are objects in one."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist

from cggr_compile import agreement, shared_readback
from cggr_compile.agreement import Agreement
from cggr_compile.shared_readback import LAG, SharedReadback, sums

PERIOD = 4 * LAG


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(agreement, "PATIENCE", 0.3)


def processes(number=2, ranks=None):
    store, ranks = dist.HashStore(), ranks or list(range(number))
    return [Agreement(store, ranks, rank, "model") for rank in ranks]


def at_once(function, arguments):
    """Results of ``function`` in as many threads."""
    results = [None] * len(arguments)

    def call(place):
        results[place] = function(arguments[place])

    threads = [threading.Thread(target=call, args=(place,)) for place in range(len(arguments))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_all_take_one_result():
    group = processes(ranks=[2, 5, 7])
    for number in range(3):
        values = {2: [1.0 + number], 5: None, 7: [float("inf")]}
        found = at_once(
            lambda one, v=values: one.decide("a topic", v[one._rank], lambda all_of_them: all_of_them), group
        )
        assert found == [list(values.values())] * 3
    assert not any(one.alone for one in group)


def test_topics_and_models_are_counted_apart():
    store = dist.HashStore()
    group = [Agreement(store, [0, 1], rank, name) for name in ("one", "two") for rank in range(2)]
    found = at_once(lambda one: [one.decide(topic, 1, sum) for topic in ("a", "b", "a")], group)
    assert found == [[2, 2, 2]] * 4


@pytest.mark.parametrize("missing", [0, 1])
def test_nobody_waits_for_long(missing):
    group = processes(3)
    present = [one for place, one in enumerate(group) if place != missing]
    began = time.monotonic()
    assert at_once(lambda one: one.decide("a topic", 1, sum), present) == [None, None]
    assert time.monotonic() - began < 2 and all(one.alone for one in present)
    assert group[missing].decide("a topic", 1, sum) is None and group[missing].alone, "it hears that they left"
    began = time.monotonic()
    assert present[0].decide("a topic", 1, sum) is None
    assert time.monotonic() - began < 0.1, "once is enough"


def test_who_leaves_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(agreement, "PATIENCE", 60.0)
    one, other = processes()
    other.leave("Dynamo has given up")
    began = time.monotonic()
    assert one.decide("a topic", 1, sum) is None and one.alone
    assert time.monotonic() - began < 5


def test_a_store_that_is_gone():
    class Gone(dist.Store):
        def set(self, key, value):
            raise dist.DistNetworkError("connection reset by peer")

        def check(self, keys):
            raise dist.DistNetworkError("connection reset by peer")

    one = processes()[0]
    one._store = Gone()
    assert one.decide("a topic", 1, sum) is None and one.alone


class Training:
    """One process's steps: what it receives, by step."""

    def __init__(self, shared_by, numbers, period=PERIOD, offset=0):
        self.step, self.numbers, self.received = 0, numbers, {}
        self.shared = SharedReadback(shared_by, "a topic", sums, lambda: self.step, period, offset)

    def run(self, steps=1):
        for _ in range(steps):
            if (received := self.shared.receive()) is not None:
                self.received[self.step] = received
            if (numbers := self.numbers(self.step)) is not None:
                self.shared.send(torch.tensor([float(number) for number in numbers]))
            self.step += 1
            self.shared.advance()


def test_every_process_receives_the_same_at_the_same_step():
    group = [Training(one, lambda step, place=place: [step, place]) for place, one in enumerate(processes())]
    for _ in range(3 * PERIOD):
        for one in group:
            one.run()
    assert group[0].received == group[1].received
    assert group[0].received == {period + 3 * LAG: [2.0 * period, 1.0] for period in (0, PERIOD, 2 * PERIOD)}


@pytest.mark.parametrize("behind", [0, 1])
def test_processes_may_be_some_steps_apart(behind, monkeypatch):
    """Here all of them run in one thread: who waited would wait in vain."""
    monkeypatch.setattr(agreement, "PATIENCE", 0.0)
    group = [Training(one, lambda step: [1]) for one in processes()]
    group[1 - behind].run(LAG - 1)
    for _ in range(2 * PERIOD):
        for one in group:
            one.run()
    assert not any(one.shared._agreement.alone for one in group)
    assert group[behind].received == {3 * LAG: [2.0], PERIOD + 3 * LAG: [2.0]}


def test_a_process_without_numbers_takes_part():
    group = [Training(one, lambda step, place=place: [7] if place else None) for place, one in enumerate(processes())]
    for _ in range(PERIOD):
        for one in group:
            one.run()
    assert group[0].received == group[1].received == {3 * LAG: [7.0]}


def test_measured_at_every_step():
    """Then a decision is made as often as one can be."""
    group = [Training(one, lambda step: [step], period=1) for one in processes()]
    for _ in range(6 * LAG + 2):
        for one in group:
            one.run()
    assert group[0].received == group[1].received == {3 * LAG: [0.0], 6 * LAG + 1: [2.0 * (3 * LAG + 1)]}


def test_a_period_is_a_multiple_of_what_is_measured():
    group = [Training(one, lambda step: [step] if step % 5 == 1 else None, 5, 1) for one in processes()]
    for _ in range(50):
        for one in group:
            one.run()
    assert list(group[0].received.values()) == [[2.0], [32.0], [62.0]]


def test_numbers_that_are_resumed():
    """All processes load the state of one, which was saved between two steps of a decision."""
    first = [Training(one, lambda step: [step + 1]) for one in processes()]
    for _ in range(LAG + 2):
        for one in first:
            one.run()
    saved = first[0].shared.wait()
    assert saved == [1.0]
    second = [Training(one, lambda step: None) for one in processes(3)]
    for one in second:
        one.step = first[0].step
        one.shared.restore(saved)
    for _ in range(2 * LAG):
        for one in second:
            one.run()
    assert [one.received for one in second] == [{3 * LAG: [3.0]}] * 3


def test_alone_it_is_a_plain_readback():
    (one,) = processes(1)
    training = Training(one, lambda step: [step])
    training.run(5)
    assert training.received == {step: [step - 1.0] for step in range(1, 5)}


def test_steps_that_are_left_out():
    group = [Training(one, lambda step: [step]) for one in processes()]
    for one in group:
        one.run(2)
        one.step = 3 * PERIOD  # a checkpoint of later, say
        one.shared.advance()
    for _ in range(PERIOD):
        for one in group:
            one.run()
    assert group[0].received == group[1].received == {3 * PERIOD + 3 * LAG: [6.0 * PERIOD]}
    assert shared_readback.PERIOD >= 4 * LAG
