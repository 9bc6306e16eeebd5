"""What a training step keeps of sharded parameters between forward and backward pass."""

from __future__ import annotations

import models
import pytest
import torch
import torch.distributed as dist
from lockstep import gather, traced
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import CheckpointPolicy

import cggr_compile
from cggr_compile import compat
from cggr_compile.distributed import shard
from cggr_compile.passes.joint.reshard_after_forward import ReshardAfterForward

OPTIONS = {"compiler": "eager", "min_tokens_ratio": 0.25, "scoring": "random", "selection": "random"}


@pytest.fixture
def mesh():
    """Of two processes, the other one of which does not exist: what it would send is never looked at."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def tagged(function, *inputs):
    gm = traced(function, *inputs)
    result = ReshardAfterForward()(gm.graph)
    nodes = [node for node in gm.graph.nodes if "recompute" in node.meta]
    assert all(node.meta["recompute"] is CheckpointPolicy.MUST_RECOMPUTE for node in nodes)
    assert len({node.meta["ac_graph_id"] for node in nodes}) <= 1
    return {node.name for node in nodes}, result


def test_what_is_a_layout_of_parameters_alone_is_tagged():
    def function(x, a, b):
        both = torch.cat([gather(a.bfloat16()).float(), gather(b)]).t()
        return x @ both, (x @ both).t()

    names, result = tagged(function, torch.randn(3, 4), torch.randn(2, 4), torch.randn(2, 4))
    gathered = {"all_gather_into_tensor", "wait_tensor", "all_gather_into_tensor_1", "wait_tensor_1"}
    assert gathered < names and {"cat", "t"} < names and len(names) == 8 and result.details == {"gathered": 2}


@pytest.mark.parametrize(
    "function",
    [
        lambda x, a, b: gather(a * b),  # of two arguments
        lambda x, a, b: gather(a @ b.t()),
        lambda x, a, b: x @ a.t(),
    ],
)
def test_others_are_not(function):
    names, result = tagged(function, torch.randn(3, 4), torch.randn(2, 4), torch.randn(2, 4))
    assert not names and not result.matched


@pytest.mark.parametrize("minimal", [False, True])
def test_shards_alone_are_kept(mesh, monkeypatch, minimal):
    """By the partitioner of Inductor and by the default one; without the pass full parameters are."""
    graphs = []
    if minimal:
        from torch._functorch.partitioners import min_cut_rematerialization_partition as partition
    else:
        partition = compat.default_partition

    def kept(joint, inputs, **arguments):
        graphs.append(partition(joint, inputs, **arguments))
        return graphs[-1]

    monkeypatch.setattr(compat, "default_partition", kept)
    for reshards in (True, False):
        model = shard(models.PlainLM(), mesh, reshard_after_forward=reshards)
        model.compile(backend=models.backend(), options=OPTIONS)
        model(**models.make_batch()).loss.backward()
        (report,) = cggr_compile.runtime(model).reports
        assert report.matched and report.record(ReshardAfterForward.name).matched is reshards
        torch._dynamo.reset()
    full = []
    for forward, backward in graphs:
        alone = set()  # computed of gathered parameters and nothing else
        for node in forward.graph.nodes:
            if node.target is compat.ALL_GATHER or (node.all_input_nodes and alone.issuperset(node.all_input_nodes)):
                alone.add(node)
        full.append(sum(node in alone for node in forward.graph.output_node().all_input_nodes))
        again = backward.graph.find_nodes(op="call_function", target=compat.ALL_GATHER)
        # all but the token table, the positions and what only biases the forward pass
        assert (len(again) > 8) is (not full[-1])
    assert full[0] == 0 < full[1]
