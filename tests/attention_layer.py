"""One attention layer through the joint passes alone, and the same layer by plain autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cggr_compile import compat
from cggr_compile.passes.joint.resolve_markers import ResolveMarkers
from cggr_compile.passes.joint.row_sparse import RowSparseBackward


class Layer:
    """x + attention(x) at the selected rows, squared and summed; ``cast`` puts a cast between keys and attention."""

    def __init__(self, attend, batch=2, heads=4, kv_heads=4, length=9, width=8, slots=3, unused=1, cast=False):
        self.attend, self.heads, self.kv_heads, self.cast = attend, heads, kv_heads, cast
        self.rows = torch.stack([torch.randperm(length)[:slots] for _ in range(batch)])
        self.keep = torch.arange(slots).expand(batch, -1) < torch.tensor([slots, slots - unused] * batch)[:batch, None]
        hard = torch.zeros(batch, length, dtype=torch.bool).scatter(1, self.rows, self.keep)
        self.hard = {1: hard[:, :, None], 2: hard[:, None, :, None]}
        hidden = heads * width
        self.x = torch.randn(batch, length, hidden, requires_grad=True)
        sizes = (hidden, kv_heads * width, kv_heads * width)
        self.weights = [(torch.randn(hidden, size) * hidden**-0.5).requires_grad_() for size in sizes]
        self.target = torch.randn(batch, slots, hidden)

    def loss(self, x, weights, kv_gradient, stop):
        y = stop(x, 1) if kv_gradient == "project" else x
        query, key, value = (
            (source @ weight).unflatten(2, (heads, -1)).transpose(1, 2)
            for source, weight, heads in zip((x, y, y), weights, (self.heads, *[self.kv_heads] * 2), strict=True)
        )
        if kv_gradient == "stop":
            key, value = (stop(t.double(), 2).float() if self.cast else stop(t, 2) for t in (key, value))
        out = x + self.attend(query, key, value).transpose(1, 2).flatten(2)
        return (torch.ops.cggr.gather_rows(out, self.rows, self.keep) - self.target).square().sum()

    def expected(self, kv_gradient):
        stop = lambda t, axis: torch.where(self.hard[axis], t, t.detach())  # noqa: E731
        return torch.autograd.grad(self.loss(self.x, self.weights, kv_gradient, stop), (self.x, *self.weights))

    def optimised(self, kv_gradient, before=lambda graph: None, after=lambda graph: None):
        """(gradients, result of the row-sparse pass)."""
        results = []

        def partition(joint, inputs, **kwargs):
            before(joint.graph)
            results.append(RowSparseBackward()(joint.graph))
            ResolveMarkers()(joint.graph)
            after(joint.graph)
            joint.graph.lint()
            joint.recompile()
            return compat.default_partition(joint, inputs, **kwargs)

        got = self.compiled(lambda gm, inputs: compat.aot_eager(gm, inputs, partition), kv_gradient)
        return got, results[0]

    def compiled(self, backend, kv_gradient="stop"):
        torch._dynamo.reset()
        program = torch.compile(
            lambda x, weights: self.loss(x, weights, kv_gradient, torch.ops.cggr.detach_unselected),
            backend=backend,
            fullgraph=True,
            dynamic=False,
        )
        return torch.autograd.grad(program(self.x, self.weights), (self.x, *self.weights))


def assert_close(got, expected):
    # a gradient that is zero but for rounding is held to the size of the others
    rounding = 1e-6 * max(wanted.norm() for wanted in expected)
    for found, wanted in zip(got, expected, strict=True):
        assert (found - wanted).norm() <= 1e-5 * (1 + wanted.norm()) + rounding


def check(layer, kv_gradient="stop", **edits):
    """The gradients are right; what the pass says about them."""
    got, result = layer.optimised(kv_gradient, **edits)
    assert_close(got, layer.expected(kv_gradient))
    return {name: result.details[name] for name in ON_ROWS}


ON_ROWS = {"densified": {"output": 1}, "dense_attention": {}}  # the gradient of x is an output here


def masked(mask, gqa=False):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
