"""``cggr_compile.distributed.shard``: what it takes, and what a module is afterwards (see semantics/test_shard.py)."""

from __future__ import annotations

import copy

import models
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from cggr_compile.distributed import as_stored, shard
from cggr_compile.sharding import sharding_of


@pytest.fixture(autouse=True)
def two_processes():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.fixture
def mesh():
    return init_device_mesh("cpu", (2,))


def test_parameters_are_parts_and_read_whole(mesh):
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 4, bias=False))
    names, buffers = list(model.state_dict()), dict(model.named_buffers())
    model[2].weight.requires_grad_(False)
    assert shard(model, mesh) is model
    assert list(model.state_dict()) == names and dict(model.named_buffers()).keys() == buffers.keys()
    weight = dict(model.named_parameters())["0.weight"]
    assert isinstance(weight, DTensor) and weight.placements == (Shard(0),) and weight.to_local().shape == (3, 3)
    assert model[0].weight.shape == (5, 3) and not isinstance(model[0].weight, DTensor)
    assert isinstance(model[0], nn.Linear) and not dict(model.named_parameters())["2.weight"].requires_grad
    assert type(model[0]) is not type(model[2]), "of other parameters"
    with as_stored():
        assert model[0].weight is weight
    other = copy.deepcopy(model)
    assert sharding_of(other) is sharding_of(model) and other[0].weight.shape == (5, 3)
    model[0].weight = nn.Parameter(weight.detach())  # as load_state_dict(assign=True) does
    assert model[0].weight.shape == (5, 3)


def test_one_parameter_in_two_places_stays_one(mesh):
    model = models.Decoder(fused=False, tied=True, layers=1)
    assert model.lm_head.weight is model.wte.weight
    shard(model, mesh)
    assert model.lm_head._parameters["weight"] is model.wte._parameters["weight"]


def tensor_parallel(mesh):
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Shard(1)]))
    return model


def fsdp(mesh):
    model = nn.Sequential(nn.Linear(4, 4))
    fully_shard(model, mesh=mesh)
    return model


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (lambda mesh: nn.Linear(2, 2), {"mesh": None}, "mesh must be a DeviceMesh of one axis, or of two"),
        (lambda mesh: nn.Linear(2, 2), {"reshard_after_forward": 2}, "reshard_after_forward must be True or False"),
        (lambda mesh: nn.Linear(2, 2), {"mp_policy": torch.bfloat16}, "mp_policy must be a MixedPrecisionPolicy"),
        (
            lambda mesh: nn.Linear(2, 2),
            {"mp_policy": MixedPrecisionPolicy(output_dtype=torch.float32)},
            "without output_dtype",
        ),
        (lambda mesh: torch.randn(2), {}, "model must be a Module"),
        (lambda mesh: DistributedDataParallel(nn.Linear(2, 2)), {}, "not wrapped in DistributedDataParallel"),
        (lambda mesh: shard(nn.Linear(2, 2), mesh), {}, "model must not be sharded yet"),
        (tensor_parallel, {}, "0.weight is a DTensor already"),
        (fsdp, {}, "0.weight is a DTensor already"),
        (lambda mesh: nn.Sequential(nn.LSTM(2, 2)), {}, "recurrent layers"),
    ],
)
def test_bad_arguments(mesh, make, arguments, message):
    with pytest.raises(ValueError, match=message):
        shard(make(mesh), **{"mesh": mesh, **arguments})
