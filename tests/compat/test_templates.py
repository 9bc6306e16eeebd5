"""What of Inductor's autotuner and lowerings is called."""

from __future__ import annotations

import inspect

import torch

from cggr_compile import compat


def test_templates():
    from torch._inductor import config
    from torch._inductor.lowering import maybe_layout_constraints, tag_to_layout_constraint
    from torch._inductor.select_algorithm import ExternKernelChoice, TritonTemplate, autotune_select_algorithm
    from torch._library.utils import get_layout_constraint_tag

    from cggr_compile import lowerings
    from cggr_compile.ops.score import score_partials

    assert {"name", "grid", "source"} <= set(inspect.signature(TritonTemplate).parameters)
    assert {"has_out_variant", "kernel_creator"} <= set(inspect.signature(ExternKernelChoice).parameters)
    assert callable(autotune_select_algorithm)
    gpu = torch.device("cuda", 0)  # of which nothing is asked
    assert not config.max_autotune and not compat.times_templates(gpu, torch.float32)
    with config.patch(max_autotune=True, pipeline_max_autotune_gemm=True):
        assert not compat.times_templates(gpu, torch.float32)
    lowerings.register()
    wanted = tag_to_layout_constraint(get_layout_constraint_tag(score_partials, with_default=True))
    assert maybe_layout_constraints(score_partials) is wanted
