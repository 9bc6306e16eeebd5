"""Lets Dynamo trace PEFT's DoRA layers, which end the graph in every projection."""

from __future__ import annotations

import sys
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch.nn import Module, Parameter

_registered = False


def trace_dora(model: Module) -> None:
    """Before ``model`` is captured: functions of its DoRA layers are written so that Dynamo can trace them.

    One reads the name of a type, another makes a Parameter; Dynamo, and only Dynamo, gets them in other words. A third
    clears a cache that is empty in training, which is a side effect in an activation checkpoint; the layers get one
    that looks first.
    """
    if "peft.tuners.lora.dora" not in sys.modules:
        return
    from peft.tuners.lora import dora

    layers = [module for module in model.modules() if isinstance(module, dora.DoraLinearLayer)]
    if layers:
        _register(dora.dequantize_module_weight, dora.transpose)
    for layer in layers:
        layer._cache_clear = partial(_clear, layer)


def _register(dequantize: FunctionType, transpose: FunctionType) -> None:
    global _registered
    if _registered:
        return
    _registered = True
    as_it_is = FunctionType(dequantize.__code__, dequantize.__globals__)  # another object, which is not exchanged

    @torch.compiler.substitute_in_graph(dequantize)
    def module_weight(module: Any) -> Any:
        if type(module.weight) is Parameter and not hasattr(module, "W_q"):
            return module.weight
        return as_it_is(module)

    @torch.compiler.substitute_in_graph(transpose)
    def transposed(weight: Any, fan_in_fan_out: Any) -> Any:
        if not fan_in_fan_out:
            return weight
        return weight.detach().T if isinstance(weight, Parameter) else weight.T  # Parameter(weight.T) is a leaf


def _clear(layer: Any) -> None:
    if layer._dora_cache:
        layer._dora_cache.clear()
