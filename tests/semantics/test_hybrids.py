"""Hybrids: a token mixer that is no attention has the gates of one, and a dense backward of its own."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
import torch.nn.functional as F
from models import HIDDEN, IGNORE, VOCAB, Output, compiled, make_batch, randomise
from reference import Run, assert_same, backward, dense, hf_reference, worst
from torch import Tensor, nn
from training import complaints, metrics, picks

import cggr_compile

SEQ, RATIO = 8, 0.25
slow = pytest.mark.slow


class LinearAttention(nn.Module):
    """Sums of the outer products of keys and values so far; a gate at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(HIDDEN, 4 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, gate = self.in_proj(x).chunk(4, dim=-1)
        states = (k.tanh()[..., :, None] * v[..., None, :]).cumsum(1) / SEQ
        return self.out_proj((q[..., None, :] @ states).squeeze(-2) * F.silu(gate))


class Recurrence(nn.Module):
    """h[t] = a[t] h[t - 1] + x[t], written position by position into one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x, decay = self.in_proj(x).chunk(2, dim=-1)
        state, states = torch.zeros_like(x[:, 0]), torch.zeros_like(x)
        for t in range(SEQ):
            state = torch.sigmoid(decay[:, t]) * state + x[:, t]
            states[:, t] = state
        return self.out_proj(states)


class Shift(nn.Module):
    """Mixes before any projection: the gate is at the input with ``stop`` as well."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Identity(), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(x + F.pad(self.in_proj(x), (0, 0, 1, -1)))


class Chunks(nn.Module):
    """Products within chunks of a padded sequence; their weights come past the convolution in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.conv = nn.Conv1d(HIDDEN, HIDDEN, 2, padding=1, groups=HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.in_proj(x).chunk(2, dim=-1)
        x = self.conv(x.transpose(1, 2))[..., :SEQ].transpose(1, 2)
        x, weight = (F.pad(t, (0, 0, 0, 1)).unflatten(1, (3, 3)) for t in (x, weight))
        mixed = (x @ x.transpose(-1, -2)).tril() @ (x * weight.tanh())
        return self.out_proj(mixed.flatten(1, 2)[:, :SEQ])


@torch.library.custom_op("cggr_tests::decayed_sums", mutates_args=())
def decayed_sums(x: Tensor, decay: Tensor) -> Tensor:
    """``h[t] = decay[t] * h[t - 1] + x[t]`` of [B, S, H], as a library's kernel: one operator of no name we know."""
    state, found = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        state = decay[:, t] * state + x[:, t]
        found.append(state)
    return torch.stack(found, 1)


@torch.library.custom_op("cggr_tests::decayed_sums_backward", mutates_args=())
def decayed_sums_backward(grad: Tensor, states: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    later = torch.cat([decay[:, 1:], torch.zeros_like(decay[:, :1])], 1)
    grad_x = decayed_sums(grad.flip(1), later.flip(1)).flip(1)
    return grad_x, grad_x * F.pad(states, (0, 0, 1, -1))


decayed_sums.register_fake(lambda x, decay: torch.empty_like(x))
decayed_sums_backward.register_fake(lambda grad, states, decay: (torch.empty_like(grad), torch.empty_like(grad)))
decayed_sums.register_autograd(
    lambda ctx, grad: decayed_sums_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output, inputs[1]),
)


class Library(nn.Module):
    """A recurrence by an operator of another library."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        x, decay = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(decayed_sums(x.contiguous(), torch.sigmoid(decay)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k_proj, self.v_proj, self.out = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (models.split_heads(project(x)) for project in (self.q, self.k_proj, self.v_proj))
        return self.out(models.attend_sdpa(q, k, v).transpose(1, 2).reshape(x.shape))


class Beside(nn.Module):
    """Attention and another mixer in one block."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mixer = Attention(), Recurrence()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x) + self.mixer(x)


class Hybrid(nn.Module):
    """Blocks with these mixers, an MLP each; called as transformers' models are."""

    def __init__(self, *mixers: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wte, self.lm_head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, VOCAB)
        self.mixers = nn.ModuleList(mixer() for mixer in mixers)
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(2 * len(mixers) + 1))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(HIDDEN, 48), nn.GELU(), nn.Linear(48, HIDDEN)) for _ in mixers
        )
        randomise(self)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, use_cache: bool | None = None) -> Any:
        x = self.wte(input_ids)
        for i, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            x = x + mixer(self.norms[2 * i](x))
            x = x + mlp(self.norms[2 * i + 1](x))
        logits = self.lm_head(self.norms[-1](x))
        if labels is None:
            return Output(None, logits)
        target = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]
        return Output(F.cross_entropy(logits.view(-1, VOCAB), target.reshape(-1)), logits)


_SIZES = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2}
_SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SSD = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}
_DELTA = {f"linear_{name}": 2 for name in ("num_value_heads", "num_key_heads")}
_DELTA |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_EXPERTS |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 48, "block_multiple_of": 8},
    "bamba": {"attn_layer_indices": [1], **_SSD},
    "falcon_h1": {**_SSD, "mamba_d_ssm": 32, "mamba_d_head": 8},
    "qwen3_next": {**_DELTA, **_EXPERTS, "layer_types": ["linear_attention", "full_attention"]},
}
KINDS = {"lfm2": "convolution", "bamba": "linear_attention", "falcon_h1": "linear_attention"}
KINDS |= {"qwen3_next": "linear_attention", "plain": "scan", "loop": "recurrence", "beside": "recurrence"}
KINDS |= {"chunks": "linear_attention", "library": "scan"}
PLAIN = {
    "plain": (LinearAttention, Shift, Attention, LinearAttention),
    "loop": (Attention, Recurrence),
    "beside": (Beside,),
    "chunks": (Chunks, Attention),
    "library": (Library, Attention),
}


def make(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    if name in PLAIN:
        return Hybrid(*PLAIN[name]), make_batch(seq=SEQ)
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **{**_SIZES, **TRANSFORMERS[name]})
    return randomise(transformers.AutoModelForCausalLM.from_config(config)).train(), make_batch(seq=SEQ)


def step(name: str, **options: Any) -> tuple[nn.Module, dict[str, Tensor], Run]:
    model, batch = make(name)
    compiled(model, **{"min_tokens_ratio": RATIO, "gradient": "routed", **options})
    got = backward(model, model(**batch).loss)
    assert metrics(model)["level"] == "routed", metrics(model)
    return model, batch, got


QUICK = [
    ("plain", "project"),
    ("loop", "stop"),
    ("beside", "project"),
    ("chunks", "stop"),
    ("library", "stop"),
    ("lfm2", "stop"),
]
CASES = [
    pytest.param(name, mode, marks=() if (name, mode) in QUICK else slow)
    for name in (*PLAIN, *TRANSFORMERS)
    for mode in ("project", "stop")
]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_gradients_are_those_of_the_gates(name: str, mode: str) -> None:
    model, batch, got = step(name, kv_gradient=mode)
    chosen = picks(model)
    assert_same(got, hf_reference(model, batch, chosen, gradient="routed", kv_gradient=mode))
    others = [{"gradient": "exact"}, {"gradient": "routed", "kv_gradient": "stop" if mode == "project" else "project"}]
    for other in others:  # the check can fail
        assert worst(got, hf_reference(model, batch, chosen, **other))[0] > 1e-3, other
    report = cggr_compile.runtime(model).reports[0]
    record = report.record("route_gradient")
    assert KINDS[name] in " ".join(record.details["gated"].values()), record.details
    assert "gated, dense backward" in record.reason and "mixers" not in record.details


@pytest.mark.parametrize("name", ["plain", *(pytest.param(name, marks=slow) for name in TRANSFORMERS)])
def test_everything_around_the_mixers_is_on_rows(name: str) -> None:
    """What is dense in the backward belongs to a mixer, or adds its gradient to another one; nobody is warned of it."""
    with complaints() as heard:
        model, _, _ = step(name, verify=True)
    assert not any("still computes every position" in text or "mixed without" in text for text in heard), heard
    (report,) = cggr_compile.runtime(model).reports
    assert report.verification is not None and not report.verification.note, report.verification
    assert report.verification.captured_error is not None and report.verification.captured_error < 1e-4
    mixers = list(report.record("route_gradient").details["gated"])
    places = report.record("row_sparse").details["densified_at"]
    inside = {place for each in places.values() for place in each if place}
    assert all(any(f"{place}.".startswith(f"{path}.") for path in mixers) for place in inside), places
    assert not report.record("row_sparse").details["dense_attention"]


@pytest.mark.parametrize("name", ["beside", *(pytest.param(name, marks=slow) for name in TRANSFORMERS)])
def test_ratio_of_one_is_the_model(name: str) -> None:
    model, batch = make(name)
    compiled(model, min_tokens_ratio=1.0)
    assert_same(backward(model, model(**batch).loss), dense(model, batch))


def test_weights_of_the_gates() -> None:
    """As for keys and values: the gradient of a selected row that ends in a mixer's input is multiplied there."""
    model, batch, got = step("plain", selection="importance", kv_weight="1/sqrt(p)")
    same = {"gradient": "routed", "kv_gradient": "project"}
    assert_same(got, hf_reference(model, batch, picks(model), kv_weight="1/sqrt(p)", **same))
    assert worst(got, hf_reference(model, batch, picks(model), **same))[0] > 1e-3


def test_explain_names_the_gates() -> None:
    model, batch = make("plain")
    compiled(model, min_tokens_ratio=RATIO, gradient="routed")
    said = cggr_compile.explain(model, **batch).reason
    assert "4 blocks" in said and "scan: gated, dense backward, in mixers.0, mixers.3" in said, said
    assert "shift: gated, dense backward, in mixers.1" in said, said
