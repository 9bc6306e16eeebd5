"""Every private name that compat.py leans on exists, with the signature it is called with."""

from __future__ import annotations

import inspect

import torch

from cggr_compile import compat


def test_private_signatures():
    from torch._dynamo import config
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._functorch.partitioners import default_partition
    from torch._inductor.compile_fx import compile_fx

    assert "config_patches" in inspect.signature(compile_fx).parameters
    assert "num_fwd_outputs" in inspect.signature(default_partition).parameters
    assert callable(InstructionTranslator.current_tx)
    assert callable(aot_autograd)
    assert config.recompile_limit > 0 and _debug_get_cache_entry_list(test_modes.__code__) == []
    assert compat.next_checkpoint_id() < compat.next_checkpoint_id()
    assert inspect.isclass(compat.custom_graph_pass())
    assert "joint_custom_pre_pass" in compat.inductor_option_names()


def test_modes():
    modes = compat.inductor_modes()
    assert modes["default"] == {} and modes["reduce-overhead"]["triton.cudagraphs"]


def test_outside_a_capture():
    assert compat.frame_scopes() == {} and compat.recompilations_left() is None


def test_static_fake_tensors():
    mode, real = compat.static_fake_mode(), torch.zeros(3, 7)
    assert [type(size) for size in mode.from_tensor(real).shape] == [int, int]
    assert compat.is_fake(mode.from_tensor(real)) and not compat.is_fake(real)


def test_module_at():
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(1, 1)])})
    scopes = {"L": {"self": model}, "G": {"net": model}}
    assert compat.module_at("L['self'].layers.0", scopes) is model["layers"][0]
    assert compat.module_at("G['net']", scopes) is model
    for path in ("L['other']", "L['self'].layers.7", "nonsense", "L['self'].layers.0.weight"):
        assert compat.module_at(path, scopes) is None


def test_user_joint_passes():
    def one(graph):
        return None

    assert compat.user_joint_passes() == ()
    with torch._inductor.config.patch(joint_custom_pre_pass=one):
        assert compat.user_joint_passes() == (one,)


def test_cpp_compiler(monkeypatch):
    from torch._inductor import cpp_builder, exc

    def missing():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    assert compat.cpp_compiler() is None
