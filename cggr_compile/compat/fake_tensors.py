"""Fake tensors and the modes that make them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch.fx import GraphModule


def capture_fake_mode(gm: GraphModule) -> Any:
    """The FakeTensorMode that made a Dynamo graph's example values (not the one its backend traces under)."""
    from torch._subclasses.fake_tensor import FakeTensor

    values = (node.meta.get("example_value") for node in gm.graph.nodes)
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)


def is_fake(tensor: torch.Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def values_of(tensor: torch.Tensor) -> Any:
    """``tensor.tolist()`` of a graph's constant, while a FakeTensorMode is entered; None if it is fake itself."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    if is_fake(tensor):
        return None
    with unset_fake_temporarily():
        return tensor.tolist()


def static_fake_mode() -> Any:
    """A FakeTensorMode whose tensors have numbers for sizes."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # Inductor's cache asks for a shape environment
    mode = FakeTensorMode(shape_env=ShapeEnv(assume_static_by_default=True), static_shapes=True)
    convert = mode.from_tensor

    def from_tensor(tensor: Any, **arguments: Any) -> Any:
        # AOTAutograd asks for symbolic sizes where there is a shape environment
        arguments.pop("symbolic_context", None)
        return convert(tensor, **{**arguments, "static_shapes": True})

    mode.from_tensor = from_tensor  # type: ignore[method-assign]  # higher-order operators know no subclass of it
    return mode


def symbolic_sizes_kept(fake_mode: Any) -> Any:
    """Around operations on fake tensors: the C++ forms of some (``linear``, in torch 2.11) turn sizes into numbers."""
    from torch._dispatch.python import enable_python_dispatcher

    symbolic = fake_mode.shape_env is not None and fake_mode.shape_env.var_to_range
    return enable_python_dispatcher() if symbolic else nullcontext()
