"""Launches of Triton kernels from a lowering."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from cggr_compile.scoped_patch import ScopedPatch


def launch(
    kernel: Any, pointers: dict[str, Any], arguments: dict[str, Any], configs: Sequence[tuple[int, Any]]
) -> None:
    """In a lowering: one launch of a Triton kernel, as torch.compile launches the kernels of users.

    Args:
        pointers: nodes by the names of the kernel's parameters. arguments: its other arguments.
        configs: (number of programs, block sizes with num_warps and num_stages); if there are several, they are timed.
    """
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_mutation
    from torch._inductor import config
    from torch._inductor.lowering import lowerings

    configs = configs if config.max_autotune else configs[:1]
    tuned = _tuned(kernel, tuple(tuple(sorted(options.items())) for _, options in configs))
    with _analysed_once():
        lowerings[triton_kernel_wrapper_mutation](
            kernel_idx=kernel_side_table.add_kernel(tuned),
            constant_args_idx=kernel_side_table.add_constant_args(arguments),
            grid=[(programs, 1, 1) for programs, _ in configs],
            tma_descriptor_metadata={},
            kwargs=pointers,
        )


@contextmanager
def _analysed_once() -> Iterator[None]:
    """Look only once per graph for what a kernel writes: Inductor translates the kernel for every launch of it."""
    with ExitStack() as stack:
        for patch in _remembered_analyses():
            stack.enter_context(patch())
        yield


@functools.cache
def _remembered_analyses() -> tuple[ScopedPatch, ...]:
    from torch._higher_order_ops import triton_kernel_wrap as module
    from torch._inductor.virtualized import V

    found: Any = WeakKeyDictionary()  # by the graph that is being lowered

    def remembering(analyse: Callable[..., Any], kernel: Any, arguments: dict[str, Any], *more: Any) -> Any:
        """``analyse``, with its results kept: of tensors only the data types matter."""
        kinds = tuple((name, getattr(value, "dtype", value)) for name, value in arguments.items())
        results = found.setdefault(V.graph, {})
        if (analyse, kernel, kinds) not in results:
            results[analyse, kernel, kinds] = analyse(kernel, arguments, *more)
        return results[analyse, kernel, kinds]

    names = ("identify_accessed_tensors", "identify_mutated_tensors")
    return tuple(ScopedPatch(module, name, remembering) for name in names if hasattr(module, name))


@functools.cache
def _tuned(kernel: Any, configs: tuple[tuple[tuple[str, int], ...], ...]) -> Any:
    import triton

    def configuration(options: dict[str, int]) -> Any:
        launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
        return triton.Config(options, **launch)

    return triton.autotune(configs=[configuration(dict(options)) for options in configs], key=[])(kernel)
