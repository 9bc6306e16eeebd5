"""Inductor's entry, settings and hooks."""

from __future__ import annotations

import inspect

import torch

from cggr_compile import compat
from cggr_compile.compat import inductor


def test_names_of_inductor():
    from torch._inductor.compile_fx import compile_fx

    assert "config_patches" in inspect.signature(compile_fx).parameters
    assert inspect.isclass(compat.custom_graph_pass())
    assert {"joint_custom_pre_pass", compat.CUDA_GRAPHS} <= compat.inductor_option_names()


def test_settings_of_modes():
    modes = compat.inductor_modes()
    assert modes["default"] == {} and modes["reduce-overhead"]["triton.cudagraphs"]


def test_user_joint_passes():
    def one(graph):
        return None

    assert compat.user_joint_passes() == ()
    with torch._inductor.config.patch(joint_custom_pre_pass=one):
        assert compat.user_joint_passes() == (one,)


def test_fusion_limit():
    from torch._inductor import config

    (name,) = limit = compat.fusion_limit(16)
    assert limit[name] == 16 and name in compat.inductor_option_names()
    with config.patch({name: 4}):  # the user's own
        assert compat.fusion_limit(16)[name] == 4


def test_sort_stably_keeps_an_order_that_is_right():
    graph = torch.fx.symbolic_trace(lambda x, y: (x.sin() + y.cos()) * x).graph
    names = [node.name for node in graph.nodes]
    compat.sort_stably(graph)
    assert [node.name for node in graph.nodes] == names
    first = next(node for node in graph.nodes if node.op == "call_method")
    graph.output_node().append(first)  # behind what needs it
    compat.sort_stably(graph)
    graph.lint()


def test_hash_of_files(tmp_path, monkeypatch):
    first, second, edited = (tmp_path / name for name in ("first.py", "second.py", "edited.py"))
    for path in (first, second, edited):
        path.write_text(path.name)
    seen = {compat.hash_of_files([first, second]), compat.hash_of_files([first, edited])}
    assert compat.hash_of_files([first, second]) in seen and len(seen) == 2
    monkeypatch.setattr(inductor, "TORCH_VERSION", "9.0")
    assert compat.hash_of_files([first, second]) not in seen
