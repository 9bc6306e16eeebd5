"""Triton templates and operators between which Inductor's autotuner chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def times_templates(device: torch.device, dtype: torch.dtype) -> bool:
    """In a lowering: whether Inductor is to time Triton templates with outputs of this kind (max-autotune)."""
    try:
        import jinja2  # noqa: F401
        from torch._inductor import config, ir
        from torch._inductor.select_algorithm import TritonTemplate  # noqa: F401
        from torch._inductor.utils import use_triton_template
    except ImportError:
        return False
    if not (config.max_autotune or config.max_autotune_gemm) or config.pipeline_max_autotune_gemm:
        return False  # the pipelined autotuner has no result before scheduling
    return bool(use_triton_template(ir.FixedLayout(device, dtype, [1])))


def triton_template(name: str, grid: Callable[..., tuple[int, int, int]], source: str) -> Any:
    """A template for :func:`autotune`. ``grid``: number of programs, of the output's sizes and the constants."""
    from torch._inductor.select_algorithm import TritonTemplate

    return TritonTemplate(name=name, grid=grid, source=source)


def operator_choice(name: str, op: Any, arrange: Callable[..., tuple[Any, ...]]) -> Any:
    """A call of an operator, for :func:`autotune`. ``arrange``: its arguments, of the tensors and options there."""
    from torch._inductor import ir
    from torch._inductor.select_algorithm import ExternKernelChoice

    def call(*tensors: torch.Tensor, **options: Any) -> Any:
        return op(*arrange(*tensors, **options))

    def generate(*nodes: Any, **options: Any) -> Any:
        return ir.FallbackKernel.create(op, *arrange(*nodes, **options))

    return ExternKernelChoice(call, name=name, has_out_variant=False, kernel_creator=generate)


def autotune(
    name: str,
    tensors: Sequence[Any],
    shape: Sequence[int],
    dtype: torch.dtype,
    operators: Sequence[tuple[Any, dict[str, Any]]],
    template: Any,
    configs: Sequence[dict[str, Any]],
    *,
    written: Sequence[Any] = (),
    examples: dict[int, Callable[[Any], torch.Tensor]] | None = None,
) -> Any:
    """In a lowering: an operator's result, computed in the way that Inductor's autotuner finds fastest.

    Args:
        tensors: nodes that ``realize_fixed_layout`` returned. shape, dtype: of the result, which is contiguous.
        operators: each an :func:`operator_choice` and its options; the first is used if nothing can be timed.
        template, configs: a :func:`triton_template` and its constants, num_warps and num_stages, one choice for each.
        written: those of ``tensors`` that every choice writes to.
        examples: of tensors by their number, values to time the choices with (given the node), where random ones
            will not do.
    """
    from torch._inductor import ir
    from torch._inductor.select_algorithm import autotune_select_algorithm

    layout = ir.FixedLayout(tensors[0].get_device(), dtype, list(shape))
    choices: list[Any] = []
    for operator, options in operators:
        operator.maybe_append_choice(choices, input_nodes=list(tensors), layout=layout, **options)
    more = {"mutated_inputs": list(written)} if written else {}
    for config in configs:
        template.maybe_append_choice(choices, input_nodes=list(tensors), layout=layout, **more, **config)
    # a fused reader would be timed with each choice: there is none for a result that is reduced
    found = autotune_select_algorithm(
        name, choices, list(tensors), layout, input_gen_fns=examples, return_multi_template=False
    )
    return found[0] if isinstance(found, tuple) else found  # 2.13 returns the choice too
