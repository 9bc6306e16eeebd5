"""What Dynamo is compiling: names of Dynamo's that are read, and what they say in and outside of a capture."""

from __future__ import annotations

import inspect

import torch

from cggr_compile import compat


def test_names_of_dynamo():
    from torch._dynamo import config
    from torch._dynamo.cache_size import exceeds_recompile_limit
    from torch._dynamo.convert_frame import CatchErrorsWrapper, _compile
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list, _TorchDynamoContext
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._dynamo.utils import register_hook_for_recompile_user_context

    assert callable(InstructionTranslator.current_tx) and callable(register_hook_for_recompile_user_context)
    assert config.recompile_limit > 0 and _debug_get_cache_entry_list(test_names_of_dynamo.__code__) == []
    assert config.accumulated_recompile_limit > 0
    assert list(inspect.signature(exceeds_recompile_limit).parameters) == ["cache_size", "compile_id"]
    assert {"code", "locals", "cache_size", "compile_id"} <= set(inspect.signature(_compile).parameters)
    assert callable(CatchErrorsWrapper.__call__)
    assert "compile_wrapper" in inspect.getsource(_TorchDynamoContext.__call__)


def test_what_is_about_to_be_compiled():
    seen = []

    def hook():
        seen.append(compat.compilation())
        return ""

    def step(x):
        return x + 1

    compat.before_every_compilation(hook)
    compat.before_every_compilation(hook)
    try:
        with torch._dynamo.config.patch(recompile_limit=1):
            run = torch.compile(step, backend="eager", dynamic=False)
            run(torch.ones(2)), run(torch.ones(3))
    finally:
        torch._dynamo.utils.get_hook_for_recompile_user_context().remove(hook)
    assert [(one.code, one.limit, one.value) for one in seen] == [
        (step.__code__, None, None),
        (step.__code__, "recompile_limit", 1),
    ]
    assert list(seen[0].scope) == ["x"]


def test_outside_a_capture():
    here = inspect.currentframe()
    assert compat.frame_scopes() == {} and compat.captured_code() is None and compat.recompilations_left() is None
    assert compat.compilation() is None and compat.below_dynamo(here) is None
