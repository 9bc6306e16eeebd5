from __future__ import annotations

import torch

from cggr_compile.readback import Readback


class Event:
    """A CUDA event that has been reached once somebody says so."""

    reached = False

    def query(self):
        return self.reached

    def synchronize(self):
        self.reached = True


def test_arrives_once():
    figures = Readback()
    assert figures.receive() is None and figures.wait() is None
    figures.send(torch.tensor([1.0, 2.0]))
    figures.send(torch.tensor([3.0, 4.0]))  # one is under way
    assert figures.wait() == [1.0, 2.0] and figures.receive() == [1.0, 2.0]
    assert figures.receive() is None
    figures.send(torch.tensor([5.0]))
    assert figures.receive() == [5.0]


def test_nobody_waits_for_the_event():
    figures = Readback()
    figures.send(torch.tensor([1.0]))
    figures._event = Event()
    assert figures.receive() is None
    figures.send(torch.tensor([2.0]))
    figures._event.reached = True
    assert figures.receive() == [1.0]


def test_a_checkpoint_waits():
    figures = Readback()
    figures.send(torch.tensor([1.0]))
    figures._event = Event()
    assert figures.wait() == [1.0] and figures._event.reached
    assert figures.receive() == [1.0], "waiting has not taken it away"
