"""``PersistentTRMLP``: its output and losses against formulas, its training, its masks, its metrics."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn.functional import softmax

from cggr_compile import PersistentTRMLP, create_persistent_tr_mlp

H, INNER, EXPERTS = 8, 6, 5


def make(top_k=2, **options):
    return create_persistent_tr_mlp(H, INNER, EXPERTS, top_k, **options)


def by_hand(layer, x, mask=None, z_loss_weight=0.0):
    """Output and auxiliary loss, token after token, from the definitions in the docstring."""
    output, counts, total_p, z = torch.zeros_like(x), torch.zeros(EXPERTS), torch.zeros(EXPERTS), 0.0
    tokens = x.reshape(-1, H)
    routed = [True] * len(tokens) if mask is None else mask.flatten().tolist()
    for t, token in enumerate(tokens):
        if not routed[t]:
            continue
        logits = layer.router @ token
        p = softmax(logits, 0)
        best = p.topk(layer.top_k).indices
        scale = p[best].sum() if layer.top_k > 1 else 1.0
        for e in best.tolist():
            gate, up = layer.gate_up_proj[e].split(INNER)
            inner = torch.nn.functional.silu(gate @ token) * (up @ token)
            output.view(-1, H)[t] += p[e] / scale * (layer.down_proj[e] @ inner)
            counts[e] += 1
        total_p, z = total_p + p, z + logits.logsumexp(0) ** 2
    alive = max(sum(routed), 1)
    balance = EXPERTS * (counts / (alive * layer.top_k) * total_p / alive).sum()
    return output, layer.aux_loss_weight * balance + z_loss_weight * z / alive


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
@pytest.mark.parametrize("kept", [None, 0.5, 0.0])
@pytest.mark.parametrize("z_loss_weight", [0.0, 0.1])
def test_output_losses_and_gradients(top_k, kept, z_loss_weight):
    layer, x = make(top_k, z_loss_weight=z_loss_weight), torch.randn(2, 7, H, requires_grad=True)
    mask = None if kept is None else torch.rand(2, 7) < kept
    output, aux_loss = layer(x, mask=mask)
    wanted, wanted_loss = by_hand(layer, x, mask, z_loss_weight)
    torch.testing.assert_close(output, wanted, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(aux_loss, torch.as_tensor(wanted_loss))
    if kept == 0.0:
        assert aux_loss == 0.0 and not output.any()
        return
    upstream = torch.randn_like(output)
    leaves = (x, *layer.parameters())
    got = torch.autograd.grad((output * upstream).sum() + aux_loss, leaves)
    for a, b in zip(got, torch.autograd.grad((wanted * upstream).sum() + wanted_loss, leaves), strict=True):
        assert b.any()
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_loss_counts_every_assignment():
    """First choices that are even and second choices that are all the same: a top-1 loss would call that balanced."""
    layer = make(aux_loss_weight=1.0)
    layer.router.data.zero_()
    layer.router.data[:4, :4] = 5 * torch.eye(4)
    layer.router.data[4, :4] = 4.0
    tokens = torch.eye(H)[:4]
    mean = softmax(tokens @ layer.router.T, -1).mean(0)
    _, aux_loss = layer(tokens)
    assert layer.metrics()["top_expert_load"] == 0.5
    torch.testing.assert_close(aux_loss, EXPERTS * torch.tensor([0.125, 0.125, 0.125, 0.125, 0.5]) @ mean)
    top_1 = EXPERTS * torch.tensor([0.25, 0.25, 0.25, 0.25, 0.0]) @ mean
    assert abs(aux_loss - top_1) > 0.1


def test_experts_and_router_learn():
    torch.manual_seed(1)
    layer, x = make(), torch.randn(4, 16, H)
    target, before = torch.randn(4, 16, H) * 0.3, copy.deepcopy(layer)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        output, aux_loss = layer(x)
        loss = (output - target).square().mean()
        (loss + aux_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    for (name, now), then in zip(layer.named_parameters(), before.parameters(), strict=True):
        moved = (now - then).abs().flatten(1).amax(1)
        assert (moved > 1e-3).all(), f"{name}: some expert did not learn"


def test_masked_tokens_touch_nothing():
    layer, x = make(), torch.randn(2, 7, H)
    mask = torch.rand(2, 7) < 0.5
    output, aux_loss = layer(x, mask=mask)
    poisoned = torch.where(mask[..., None], x, 7.0).requires_grad_()
    again, same_loss = layer(poisoned, mask=mask)
    assert torch.equal(output, again) and torch.equal(aux_loss, same_loss) and not again[~mask].any()
    (again.sum() + same_loss).backward()
    assert not poisoned.grad[~mask].any() and poisoned.grad[mask].any()
    packed, _ = layer(x[mask])
    torch.testing.assert_close(output[mask], packed)


def test_metrics():
    layer = make(1)
    layer.router.data.zero_()
    _, aux_loss = layer(torch.randn(2, 3, H))
    assert layer.metrics() == pytest.approx(
        {"router_entropy": math.log(EXPERTS), "top_expert_load": 1.0, "aux_loss": 0.01}  # ties go to the first
    )
    assert aux_loss.item() == pytest.approx(0.01)
    assert not any("metrics" in name for name in layer.state_dict())


def test_autocast_and_dtypes():
    layer, x = make(), torch.randn(3, H)
    with torch.autocast("cpu", torch.bfloat16):
        output, aux_loss = layer(x)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16 and aux_loss.dtype == layer.gate_up_proj.grad.dtype == torch.float32
    half = make(dtype=torch.bfloat16)
    assert half(x.bfloat16())[0].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="hidden_states must"):
        half(x)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_in_one_graph(backend):
    layer, x = make(), torch.randn(2, 6, H)
    mask = torch.rand(2, 6) < 0.5
    results = []
    for call in (layer, torch.compile(layer, backend=backend, fullgraph=True)):
        layer.zero_grad()
        output, aux_loss = call(x, mask=mask)
        (output.square().sum() + aux_loss).backward()
        results.append([output.detach(), aux_loss.detach(), *(p.grad.clone() for p in layer.parameters())])
        assert layer.metrics()["aux_loss"] == pytest.approx(aux_loss.item())
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (dict(hidden_dim=0), "hidden_dim"),
        (dict(intermediate_dim=-1), "intermediate_dim"),
        (dict(num_experts=0), "num_experts"),
        (dict(top_k=0), "top_k"),
        (dict(top_k=6), "top_k"),
        (dict(aux_loss_weight=-1.0), "aux_loss_weight"),
        (dict(z_loss_weight=math.nan), "z_loss_weight"),
    ],
)
def test_errors_name_the_argument(arguments, name):
    sizes = dict(hidden_dim=H, intermediate_dim=INNER, num_experts=EXPERTS)
    with pytest.raises(ValueError, match=f"^{name} must"):
        PersistentTRMLP(**{**sizes, **arguments})


def test_wrong_inputs():
    layer = make()
    with pytest.raises(ValueError, match="hidden_states must"):
        layer(torch.randn(2, 3, H + 1))
    for mask in (torch.ones(3, 2, dtype=torch.bool), torch.ones(2, 3)):
        with pytest.raises(ValueError, match="mask must"):
            layer(torch.randn(2, 3, H), mask=mask)
