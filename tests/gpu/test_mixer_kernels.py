"""Kernels of flash-linear-attention in a hybrid: routed as one operator, told where they end the graph."""

from __future__ import annotations

import copy

import models
import pytest
import torch
import torch.nn.functional as F
from models import HIDDEN, IGNORE, VOCAB
from reference import Picks, dense, hf_reference
from torch import Tensor, nn

import cggr_compile

kernels = pytest.importorskip("fla.ops.gated_delta_rule", reason="needs flash-linear-attention")
HEADS, DEVICE = 2, "cuda"


def attended(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """[B, S, HEADS, D] of all but decays (logarithms) and strengths, [B, S, HEADS]."""
    result: Tensor = kernels.chunk_gated_delta_rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]
    return result


@torch.library.custom_op("cggr_tests::gated_delta_rule", mutates_args=())
def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    return attended(q, k, v, g, beta)


@torch.library.custom_op("cggr_tests::gated_delta_rule_backward", mutates_args=())
def delta_rule_backward(grad: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        out = attended(*leaves)
    return list(torch.autograd.grad(out, leaves, grad))


delta_rule.register_fake(lambda q, k, v, g, beta: torch.empty_like(v))
delta_rule_backward.register_fake(lambda grad, inputs: [torch.empty_like(tensor) for tensor in inputs])
delta_rule.register_autograd(
    lambda ctx, grad: tuple(delta_rule_backward(grad.contiguous(), list(ctx.saved_tensors))),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class DeltaRule(nn.Module):
    """Linear attention by the gated delta rule, ``as_operator`` or by the library's function as it comes."""

    def __init__(self, as_operator: bool) -> None:
        super().__init__()
        self.as_operator, self.norm = as_operator, nn.LayerNorm(HIDDEN)
        self.in_proj, self.out_proj = nn.Linear(HIDDEN, 3 * HIDDEN + 2 * HEADS), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, g, beta = self.in_proj(self.norm(x)).split([HIDDEN] * 3 + [HEADS] * 2, dim=-1)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).contiguous() for t in (q, k, v))
        rule = delta_rule if self.as_operator else attended
        y = rule(q, k, v, F.logsigmoid(g).contiguous(), beta.sigmoid().contiguous())
        return x + self.out_proj(y.flatten(2))


class Hybrid(models.PlainLM):
    """A layer of the delta rule, then one of attention."""

    def __init__(self, as_operator: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([DeltaRule(as_operator), models.Layer(models.attend_sdpa, fused=False)])
        models.randomise(self)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, use_cache: bool | None = None) -> models.Output:
        x = self.wte(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        if labels is None:
            return models.Output(None, logits)
        target = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]
        return models.Output(F.cross_entropy(logits.view(-1, VOCAB), target.reshape(-1)), logits)


def trained(model: nn.Module, batch: dict[str, Tensor], **options: object) -> tuple[nn.Module, dict[str, Tensor]]:
    """A compiled copy after one step, and its gradients."""
    model = copy.deepcopy(model)
    models.compiled(model, compiler="inductor", fallback="warn", **options)
    model(**batch).loss.backward()
    return model, {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def error(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Norm-wise relative error over all gradients."""
    difference = sum(float((ours[n].double() - g.double()).square().sum()) for n, g in reference.items())
    return (difference / sum(float(g.double().square().sum()) for g in reference.values())) ** 0.5


@pytest.mark.parametrize("mode", ["project", "stop"])
def test_as_an_operator_it_is_gated(mode: str) -> None:
    """The reference runs the same kernels, with gates as hooks; Inductor rounds what is around them in its own way."""
    model = Hybrid(as_operator=True).to(DEVICE)
    batch = {name: tensor.to(DEVICE) for name, tensor in models.make_batch(2, 64).items()}
    run, grads = trained(model, batch, gradient="routed", kv_gradient=mode, min_tokens_ratio=0.25)
    runtime = cggr_compile.runtime(run)
    assert runtime.metrics()["level"] == "routed", runtime.metrics()
    (report,) = runtime.reports
    assert "scan" in " ".join(report.record("route_gradient").details["gated"].values())
    picks = Picks(runtime.selected, runtime.weights)
    routed = error(grads, hf_reference(model, batch, picks, gradient="routed", kv_gradient=mode).grads)
    exact = error(grads, hf_reference(model, batch, picks, gradient="exact").grads)
    assert routed < 1e-2 and routed < 0.1 * exact, (routed, exact)


def test_as_it_comes_it_ends_the_graph_and_that_is_told() -> None:
    """Its public function is kept out of graphs (``torch.compiler.disable``): the step stays the model's own."""
    model = Hybrid(as_operator=False).to(DEVICE)
    batch = {name: tensor.to(DEVICE) for name, tensor in models.make_batch(2, 64).items()}
    run, grads = trained(model, batch, gradient="routed", min_tokens_ratio=0.25)
    found = cggr_compile.runtime(run).metrics()
    assert found["level"] == "dense" and "graph break" in found["fallback_reason"], found
    assert error(grads, dense(model, batch).grads) < 1e-2
