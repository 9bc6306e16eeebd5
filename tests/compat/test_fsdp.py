"""Names of FSDP2, and of the store (see semantics/test_fsdp.py)."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from cggr_compile import compat


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_processes_and_store(one_process):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert compat.fsdp_group(model) is None
    fully_shard(model[1], mesh=init_device_mesh("cpu", (1,)))
    assert compat.fsdp_group(model) == (model[1], [0])
    store = compat.default_store()
    store.set("cggr", "here")
    assert store.check(["cggr"]) and store.get("cggr") == b"here"
