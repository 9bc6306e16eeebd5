"""What a sharded step has in memory, and when its collectives start, in the code that Inductor writes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from lifetimes import Lifetimes, codes_of, in_flight
from lockstep import gather, scatter
from torch.testing._internal.distributed.fake_pg import FakeStore

from cggr_compile import compat
from cggr_compile.joint import collectives_pass
from cggr_compile.passes.collectives import merge, move

LAYERS, TOKENS, SIZE = 8, 512, 32
WEIGHT = SIZE * SIZE * 4  # bytes, of a full one and of its gradient
ACTIVATION = TOKENS * SIZE * 4
SETTINGS = {**compat.IN_PLACE, "post_grad_custom_post_pass": collectives_pass()}


@pytest.fixture(autouse=True)
def two_processes(monkeypatch):
    """The other one does not exist; a window of two weights."""
    monkeypatch.setattr(move, "AHEAD", 2 * WEIGHT)
    monkeypatch.setattr(merge, "SMALL", 2**10)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def gradients(grad, *inputs):
    """A backward pass: of inputs of layers, and of their shards."""
    found = []
    for one, x in zip(inputs[::2], inputs[1::2], strict=True):
        found.append(scatter(x.t() @ grad))
        grad = grad @ gather(one).t()
    return grad, *found


def code_of(function, *inputs):
    torch._dynamo.reset()
    (code,) = codes_of(lambda: torch.compile(function, options=SETTINGS)(*inputs), 1)
    return Lifetimes.of(code)


def shards():
    return [torch.randn(SIZE // 2, SIZE) for _ in range(LAYERS)]


def test_gradients_are_reduced_meanwhile_and_go():
    pairs = [tensor for one in shards() for tensor in (one, torch.randn(TOKENS, SIZE))]
    found = code_of(gradients, torch.randn(TOKENS, SIZE), *pairs)
    assert found.peak["gathered"] <= 3 * WEIGHT and found.peak["unreduced"] <= 2 * WEIGHT
    assert found.peak["other"] < 4 * ACTIVATION
    assert min(in_flight(found.order, "gather")[1:]) > 0 and min(in_flight(found.order, "reduce")[:-1]) > 0
