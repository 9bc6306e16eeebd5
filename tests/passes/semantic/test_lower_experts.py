"""LowerExperts: experts as transformers traces them become one operator, and nothing that is only similar does."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import models
import pytest
import torch
import torch.nn.functional as F
from capture import Captured, execute
from torch import nn
from transformers.integrations.moe import _grouped_mm, grouped_mm_experts_forward

from cggr_compile.passes.nodes import op_name

TOKENS, H, INNER, EXPERTS, TOP_K = 10, 8, 16, 4, 2


class Layer(nn.Module):
    """Router and experts; the keyword arguments make it something that ``cggr::moe`` does not compute."""

    def __init__(self, *, dtype=torch.float32, **changes):
        super().__init__()
        self.router = nn.Linear(H, EXPERTS, bias=False, dtype=dtype)
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, H, dtype=dtype))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, H, INNER, dtype=dtype) / 4)
        self.settings = SimpleNamespace(activation=F.silu, swap=False, limit=0, drop=EXPERTS, forget=0, leak=False)
        self.settings.__dict__.update({"cast": False, "grad": True, "write": False, **changes})

    def forward(self, hidden):
        s = self.settings
        weights, experts = self.router(hidden).float().softmax(-1).to(hidden.dtype).topk(TOP_K)
        ids, perm = torch.sort(experts.reshape(-1))
        rows, scales = hidden[perm // TOP_K], weights.reshape(-1)[perm]
        counts = torch.histc(ids.float(), bins=EXPERTS, min=0, max=EXPERTS - 1)
        offsets = torch.cumsum(counts, 0, dtype=torch.int32)
        nobody = (ids >= s.drop).unsqueeze(-1)
        inner = _grouped_mm(rows.masked_fill(nobody, 0.0), self.gate_up_proj.transpose(-2, -1), offs=offsets)
        if s.forget:  # a mask over something else than the experts
            inner = inner.masked_fill((perm >= s.forget).unsqueeze(-1), 0.0)
        gate, up = inner.chunk(2, -1)[:: -1 if s.swap else 1]
        if s.limit:
            up = up.clamp(-s.limit, s.limit)
        if s.write:
            self.down_proj.data.view(-1).mul_(1.0)
        with torch.set_grad_enabled(s.grad), torch.autocast("cpu", torch.bfloat16, enabled=s.cast):
            outer = _grouped_mm(s.activation(gate) * up, self.down_proj.transpose(-2, -1), offs=offsets)
        weighted = outer.masked_fill(nobody, 0.0) * scales.unsqueeze(-1)
        back = torch.empty_like(perm)
        back[perm] = torch.arange(perm.size(0), device=perm.device)
        out = weighted[back].view(-1, TOP_K, H).sum(dim=1)
        return (out, outer) if s.leak else out


def experts_of(captured):
    ours = (torch.ops.cggr.moe.default, torch.ops.cggr.moe_clamped.default)
    return [node for node in captured.gm.graph.nodes if node.target in ours]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_operator_takes_their_place(dtype):
    layer, hidden = Layer(dtype=dtype), torch.randn(TOKENS, H, dtype=dtype)
    captured = Captured(layer, hidden)
    result = captured.run("lower_experts")
    assert result.matched and "1 of 1 layers" in result.reason
    captured.check_shapes()
    left = captured.operators()
    assert not {"grouped_mm", "grouped_mm_fallback", "sort", "setitem", "empty_like", "histc", "cumsum"} & set(left)
    (node,) = experts_of(captured)
    (got,) = execute(captured, node)
    wanted = layer(hidden)
    torch.testing.assert_close(got, wanted, **({} if dtype == torch.float32 else dict(atol=0.1, rtol=0.05)))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(activation=F.gelu), "not SwiGLU"),
        (dict(swap=True), "not result 0 of chunk"),
        (dict(limit=1), "is not getitem"),
        (dict(drop=EXPERTS - 1), "masks more"),
        (dict(forget=5), "masks more"),
        (dict(leak=True), "used elsewhere"),
        (dict(activation=lambda gate: F.silu(gate) + 1), "not SwiGLU"),
        (dict(grad=False), "another grad mode or autocast"),
        (dict(cast=True), "another grad mode or autocast"),
        (dict(write=True), "writes in place to what they are computed from"),
    ],
)
def test_leaves_alone(changes, reason):
    captured = Captured(Layer(**changes), torch.randn(TOKENS, H))
    result = captured.run("lower_experts")
    assert not result.matched and reason in result.reason, result.reason
    assert captured.operators()["grouped_mm_fallback"] == 2


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("floordiv", 3),  # rows of other tokens
        ("histc", EXPERTS + 1),
        ("arange", TOKENS * TOP_K + 1),
        ("sum", 2),
    ],
)
def test_leaves_alone_what_differs_in_a_number(old, new):
    captured = Captured(Layer(), torch.randn(TOKENS, H))
    captured.run("functionalize")
    (node,) = [n for n in captured.gm.graph.nodes if op_name(n) == old]
    if old == "floordiv":
        node.args = (node.args[0], new)
    elif old == "arange":
        node.meta["example_value"] = node.meta["example_value"].new_empty(new)
    else:
        node.kwargs = {**node.kwargs, **({"bins": new} if old == "histc" else {"dim": new})}
    assert not captured.run("lower_experts").matched


class Biased(nn.Module):
    """Experts through transformers' own function, with and without what gpt-oss adds."""

    def __init__(self, has_bias=False, is_transposed=False):
        super().__init__()
        self.num_experts, self.has_gate, self.has_bias, self.is_transposed = EXPERTS, True, has_bias, is_transposed
        self._is_expert_parallel = self.has_post_expert_norm = False  # which newer releases ask for
        swap = (lambda t: t.mT.contiguous()) if is_transposed else (lambda t: t)
        self.gate_up_proj = nn.Parameter(swap(torch.randn(EXPERTS, 2 * INNER, H)))
        self.down_proj = nn.Parameter(swap(torch.randn(EXPERTS, H, INNER)))
        self.gate_up_proj_bias = nn.Parameter(torch.randn(EXPERTS, 2 * INNER))
        self.down_proj_bias = nn.Parameter(torch.randn(EXPERTS, H))

    def _apply_gate(self, product):
        gate, up = product.chunk(2, dim=-1)
        return F.silu(gate) * up

    def forward(self, hidden, experts, weights):
        return grouped_mm_experts_forward(self, hidden, experts, weights)


class GptOss(Biased):
    """As gpt-oss has it, and what is only similar."""

    def __init__(self, *, has_bias=True, is_transposed=True, low=None, one=1, step=2, limits=(1.0, 1.0)):
        super().__init__(has_bias, is_transposed)
        self.low, self.one, self.step, self.limits = low, one, step, limits

    def _apply_gate(self, product):
        gate, up = (product[..., ::2], product[..., 1::2]) if self.step == 2 else product.chunk(2, -1)
        gate, up = gate.clamp(min=self.low, max=self.limits[0]), up.clamp(min=-self.limits[1], max=self.limits[1])
        return (up + self.one) * (gate * torch.sigmoid(gate * 1.7))


def lower(layer):
    hidden, weights = torch.randn(TOKENS, H), torch.rand(TOKENS, TOP_K)
    # E: none, as under expert parallelism; releases with a flag for that expect it with the flag only
    flagged = "_is_expert_parallel" in inspect.getsource(grouped_mm_experts_forward)
    experts = torch.randint(0, EXPERTS if flagged else EXPERTS + 1, (TOKENS, TOP_K))
    captured = Captured(layer, hidden, experts, weights)
    result = captured.run("lower_experts")
    if result.matched:
        (got,) = execute(captured, *experts_of(captured))
        torch.testing.assert_close(got, layer(hidden, experts, weights), atol=1e-4, rtol=1e-4)
    return result


@pytest.mark.parametrize("layer", [Biased(), GptOss(), GptOss(is_transposed=False)])
def test_as_transformers_writes_it(layer):
    result = lower(layer)
    assert result.matched and "1 of 1" in result.reason, result.reason


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Biased(has_bias=True), "is not add"),
        (Biased(is_transposed=True), "[experts, out, in]"),
        (GptOss(has_bias=False, is_transposed=False), "not SwiGLU"),
        (GptOss(low=-1.0), "clamped SwiGLU"),
        (GptOss(one=2), "clamped SwiGLU"),
        (GptOss(limits=(1.0, 2.0)), "clamped SwiGLU"),
        (GptOss(step=1), "not alternate"),
    ],
)
def test_leaves_alone_what_transformers_writes_otherwise(layer, reason):
    result = lower(layer)
    assert not result.matched and reason in result.reason, result.reason


def test_is_idempotent():
    captured = Captured(Layer(), torch.randn(TOKENS, H))
    assert captured.run("lower_experts").matched
    del captured.results["lower_experts"]
    result = captured.run("lower_experts")
    assert not result.matched and result.reason == "no grouped products"


def test_several_layers_in_a_model():
    model, batch = models.family("mixtral"), models.make_batch()
    captured = Captured(model, **batch, use_cache=False)
    result = captured.run("lower_experts")
    layers = model.config.num_hidden_layers
    assert f"{layers} of {layers}" in result.reason
    assert captured.run("find_stack").matched
