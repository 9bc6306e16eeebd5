"""Traces of functions, and the contexts that graphs are compiled in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import GraphModule

from cggr_compile.compat.fake_tensors import static_fake_mode


def traced(function: Callable[..., Any], arguments: Sequence[Any], fake_mode: Any) -> GraphModule:
    """The ATen calls that a function of (fake) tensors makes, decomposed as Inductor does it."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    with fake_mode, torch.no_grad():
        return make_fx(function, decomposition_table=select_decomp_table())(*arguments)


@contextmanager
def tracing_under(fake_mode: Any) -> Iterator[None]:
    """Compile with this fake mode in place of the capture's; AOTAutograd's guards still reach Dynamo."""
    from torch._guards import TracingContext, tracing

    outer, inner = TracingContext.try_get(), TracingContext(fake_mode)
    with tracing(inner):
        yield
    if outer is not None:
        outer.guards_context.aotautograd_guards.extend(inner.guards_context.aotautograd_guards)


@contextmanager
def separate_tracing_context() -> Iterator[None]:
    """Compile a second graph for the same capture.

    AOTAutograd leaves what its backward compiler needs (the buffers it may reuse, say) on the tracing context, and
    compiles the backward only when it first runs: two graphs must not share one.
    """
    from torch._guards import TracingContext, tracing

    context = TracingContext.try_get()
    with tracing(copy.copy(context)):
        yield


@contextmanager
def static_inputs(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Compile with numbers for the sizes of these arguments, which Dynamo does not know.

    Else AOTAutograd makes them symbolic, and a guard on such a size has no variable of the user's to look at.
    """
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    mode = None if context is None else context.fake_mode
    # the mode hands out what it has made of a tensor, for as long as that is alive
    alive = [] if mode is None else [mode.from_tensor(tensor, static_shapes=True) for tensor in tensors]
    yield
    alive.clear()


def compilation_id() -> Any:
    """What logs call the compilation under way: hand it to :func:`compiling_later`."""
    from torch._guards import CompileContext

    return CompileContext.try_get()


@contextmanager
def compiling_later(compilation: Any, fake_mode: Any = None) -> Iterator[None]:
    """Compile a captured graph when Dynamo is no longer there, with static sizes.

    Guards are not collected: they must be those of a form of the graph that was compiled at the capture.

    Args:
        compilation: what :func:`compilation_id` gave at the capture. fake_mode: a :func:`static_fake_mode`.
    """
    from torch._guards import TracingContext, compile_context, tracing

    with compile_context(compilation), tracing(TracingContext(fake_mode or static_fake_mode())):
        yield
