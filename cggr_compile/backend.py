"""The ``torch.compile`` backend ``"cggr"``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule

from cggr_compile import compat, output_hooks
from cggr_compile.compilation import compile_captured
from cggr_compile.options import OptionError, Options
from cggr_compile.runtime import reset as reset_runtimes


def cggr(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one captured graph; ``torch.compile(model, backend="cggr", options=..., mode=...)`` calls this.

    A training step of a language model is rewritten to back-propagate from selected tokens only; any other graph
    goes to the compiler as it is. ``options``: see :class:`cggr_compile.Options`. ``mode``: as Inductor's.

    The returned function raises ValueError at its first call for an unusable option: an exception raised here
    would reach the user wrapped by Dynamo.
    """
    try:
        with compat.no_saved_tensors_hooks():
            return compile_captured(gm, list(example_inputs), Options.parse(options), mode)
    except OptionError as error:
        return _raiser(error)


def _reset() -> None:
    """``torch._dynamo.reset()``: CUDA graphs outlive the compiled code they belong to, and so does what was told."""
    compat.reset_cuda_graphs()
    reset_runtimes()


cggr.reset = _reset  # type: ignore[attr-defined]
output_hooks.watch(cggr)


def _raiser(error: ValueError) -> Callable[..., Any]:
    def raise_it(*_args: Any) -> Any:
        raise type(error)(*error.args)

    return raise_it
