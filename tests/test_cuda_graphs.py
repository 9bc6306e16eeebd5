"""CUDA graphs, as far as a machine without a GPU can tell; tests/gpu has the rest."""

from __future__ import annotations

import models
import pytest
import torch
from torch.utils._pytree import tree_leaves

from cggr_compile import compat
from cggr_compile.passes.semantic import insert_router


@pytest.mark.parametrize("arguments", [{"options": {"cuda_graphs": True}}, {"mode": "reduce-overhead"}])
def test_on_a_cpu_one_line_in_the_log(arguments, caplog, monkeypatch):
    monkeypatch.setattr(compat, "cpp_compiler", lambda: None)
    model = models.PlainLM()
    model.compile(backend=models.backend(), dynamic=False, **arguments)
    for seq in (8, 12):
        model(**models.make_batch(2, seq)).loss.backward()
    lines = [r.message for r in caplog.records if "CUDA graphs" in r.message]
    assert lines == ["CUDA graphs do nothing here: the compiler is eager"]


def test_settings_that_replay_graphs():
    modes = compat.inductor_modes()
    assert compat.uses_cuda_graphs(modes["reduce-overhead"]) and compat.uses_cuda_graphs(modes["max-autotune"])
    assert not compat.uses_cuda_graphs(modes["default"])
    with torch._inductor.config.patch({compat.CUDA_GRAPHS: True}):
        assert compat.uses_cuda_graphs({}) and not compat.uses_cuda_graphs({compat.CUDA_GRAPHS: False})


@pytest.mark.parametrize("options", [{}, {"selection": "topk", "kv_gradient": "stop"}], ids=str)
def test_the_passes_create_no_tensor_on_another_device(options, monkeypatch):
    """Inductor replays no graph that touches the CPU. The meta device stands in for the accelerator."""
    # meta tensors have no values to look at, and torch asks no autocast questions about them
    monkeypatch.setattr(insert_router, "_compute_dtype", lambda weight, *_: weight.dtype)
    devices = []

    def partition(joint, inputs, original=compat.default_partition, **kwargs):
        values = [value for node in joint.graph.nodes for value in tree_leaves(node.meta.get("val"))]
        devices.append({value.device.type for value in values if isinstance(value, torch.Tensor)})
        return original(joint, inputs, **kwargs)

    monkeypatch.setattr(compat, "default_partition", partition)
    model = models.compiled(models.PlainLM().to("meta"), **options)
    model(**{name: tensor.to("meta") for name, tensor in models.make_batch().items()})
    assert devices == [{"meta"}]
