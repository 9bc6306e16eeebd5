"""What a sharded step has in memory, and when its collectives start, in the code that Inductor writes."""

from __future__ import annotations

import models
import pytest
import torch
import torch.distributed as dist
from lifetimes import Lifetimes, codes_of
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from cggr_compile import compat
from cggr_compile.distributed import shard
from cggr_compile.passes.collectives import merge, move

LAYERS, RATIO = 5, 0.1
TABLE = models.VOCAB * models.HIDDEN * 4  # bytes, of the embedding and the head; its gradient too
AHEAD = 2 * (8 * models.HIDDEN**2 * 4)  # two layers


class Deep(models.PlainLM):
    def __init__(self) -> None:
        models.Decoder.__init__(self, fused=False, layers=LAYERS)


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setattr(move, "AHEAD", AHEAD)
    monkeypatch.setattr(merge, "SMALL", 2**10)  # norms and biases
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def lifetimes(*, sharded):
    torch._dynamo.reset()
    model = Deep()
    if sharded:
        shard(model, init_device_mesh("cpu", (2,)))
    options = {"compiler": "inductor", "min_tokens_ratio": RATIO, "selection": "random", "scoring": "random"}
    model.compile(backend=models.backend(), options=options)
    batch = models.make_batch(16, 32)
    return [Lifetimes.of(code) for code in codes_of(lambda: model(**batch).loss.backward())]


