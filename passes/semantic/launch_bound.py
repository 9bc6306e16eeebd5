"""Decides whether a smaller backward pass can be a faster one, before anything is changed for it."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from cggr_compile.causes import Cause
from cggr_compile.passes.analysis.flops import weight_flops
from cggr_compile.passes.analysis.modes import modes_of
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass, refused
from cggr_compile.passes.facts import LayerStack
from cggr_compile.passes.fx import is_static
from cggr_compile.passes.nodes import fake_value, shape_of

# Measured on an H100 and its host (135M Llama, 5 and 30 layers): a training step without CUDA graphs takes at least
# this long, however little its kernels do.
LAUNCH_MS = 3.0
LAUNCH_MS_PER_LAYER = 1.8
# What a multiprocessor of a current GPU sustains in matrix products, in TFLOP/s: H100 about 400 in all in 16 bits.
TFLOPS_PER_SM = {2: 3.0, 4: 0.5}


class LaunchBound(SemanticPass):
    """Stops the rewriting of a graph whose step is spent on kernel launches, not on arithmetic.

    The rewritten step has about as many launches as the dense one, so below some size it cannot be faster; there
    CUDA graphs are what helps, and with them it can. The estimate is rough (products and attention of the dense step
    at a typical rate, against launches per layer) and only speaks where it matters: on CUDA, without CUDA graphs.
    """

    name = "launch_bound"
    level = "routed"
    needs = (LayerStack,)
    analysis = True
    whole_graph = True
    optional = True

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        if not ctx.pays_launches:
            return PassResult(False, "launches do not count: not on CUDA, or CUDA graphs")
        if ctx.options.launch_bound == "select":
            return PassResult(False, "launch_bound='select': not estimated")
        stacks = ctx.every(LayerStack)
        layers, output = sum(len(stack.blocks) for stack in stacks), stacks[0].blocks[0].output
        if not is_static(*(stack.blocks[0].output for stack in stacks)):
            return PassResult(False, "symbolic sizes: not estimated")
        stream = fake_value(output)
        flops = 3.0 * weight_flops(gm.graph)
        for stack in stacks:
            batch, length, hidden = shape_of(stack.blocks[0].output)
            flops += 7.0 * len(stack.attentions) * batch * length**2 * hidden
        processors = torch.cuda.get_device_properties(stream.device).multi_processor_count
        width = modes_of(gm.graph)[output].product_dtype(stream).itemsize
        arithmetic = flops / (processors * TFLOPS_PER_SM[2 if width <= 2 else 4] * 1e9)
        launches = LAUNCH_MS + LAUNCH_MS_PER_LAYER * layers
        found = f"about {arithmetic:.0f} ms of arithmetic in a dense step, {launches:.0f} ms of launches"
        if arithmetic > launches:
            return PassResult(False, found)
        return refused(Cause.LAUNCH_BOUND, found=found)
