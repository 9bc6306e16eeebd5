"""A stand-in for the package flash-attn 2.8 on the CPU: its functions, autograd functions and operators.

Written from the package's interface: the operators' names, arguments, annotations of what they write to, and the
shapes of their results are the package's; the arithmetic is plain PyTorch. What it cannot show: the package's own
kernels, which are CUDA's, take 16 bits only and round otherwise.
"""

from __future__ import annotations

import importlib.machinery
import itertools
import sys
import types

import torch
import torch.nn.functional as F
from torch import Tensor


def _relative(queries: int, keys: int) -> Tensor:
    """[Sq, Sk]: how far a key is behind the query's own; the last query's own key is the last one."""
    return torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)


def _scores(q, k, scale, causal, left, right, softcap, alibi_slopes):
    """Scores [B, H, Sq, Sk] of q [B, Sq, H, D], k [B, Sk, H, D]: what softmax sees, and its slope for the soft-cap."""
    scores = torch.einsum("bihd,bjhd->bhij", q.float(), k.float()) * scale
    slope = torch.ones_like(scores)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
        slope = 1 - (scores / softcap) ** 2
    behind = _relative(q.shape[1], k.shape[1])
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.view(-1, q.shape[2], 1, 1) * behind.abs()
    right = 0 if causal else right
    unseen = torch.zeros_like(behind, dtype=torch.bool)
    if right >= 0:
        unseen |= behind > right
    if left >= 0:
        unseen |= behind < -left
    return scores.masked_fill(unseen, -torch.inf), slope


def _kept(scores, dropout_p, rng_state):
    generator = torch.Generator().manual_seed(int(rng_state[0]))
    return (torch.rand(scores.shape, generator=generator) >= dropout_p) / (1 - dropout_p)


def _repeat(tensor, heads):
    return tensor.repeat_interleave(heads // tensor.shape[2], 2)


def _forward(q, k, v, dropout_p, scale, rng_state, *form):
    scores, _ = _scores(q, _repeat(k, q.shape[2]), scale, *form)
    lse = scores.logsumexp(-1)
    weights = torch.where(torch.isfinite(lse)[..., None], torch.exp(scores - lse[..., None]), 0.0)
    if dropout_p:
        weights = weights * _kept(scores, dropout_p, rng_state)
    out = torch.einsum("bhij,bjhd->bihd", weights, _repeat(v, q.shape[2]).float())
    return torch.empty_like(q).copy_(out), torch.where(torch.isfinite(lse), lse, torch.inf)


def _backward(dout, q, k, v, out, lse, dropout_p, scale, rng_state, *form):
    heads, shared = q.shape[2], q.shape[2] // k.shape[2]
    scores, slope = _scores(q, _repeat(k, heads), scale, *form)
    weights = torch.where(torch.isfinite(lse)[..., None], torch.exp(scores - lse[..., None]), 0.0)
    kept = _kept(scores, dropout_p, rng_state) if dropout_p else torch.ones_like(scores)
    of_weights = torch.einsum("bihd,bjhd->bhij", dout.float(), _repeat(v, heads).float()) * kept
    delta = (dout.float() * out.float()).sum(-1).transpose(1, 2)
    of_scores = weights * (of_weights - delta[..., None]) * slope * scale
    dq = torch.einsum("bhij,bjhd->bihd", of_scores, _repeat(k, heads).float())
    dk = torch.einsum("bhij,bihd->bjhd", of_scores, q.float()).unflatten(2, (-1, shared)).sum(3)
    dv = torch.einsum("bhij,bihd->bjhd", weights * kept, dout.float()).unflatten(2, (-1, shared)).sum(3)
    return dq, dk, dv, delta


def _documents(cu_seqlens_q, cu_seqlens_k):
    """(slice of the queries, slice of the keys) of every sequence."""
    pairs = (itertools.pairwise(cumulative.tolist()) for cumulative in (cu_seqlens_q, cu_seqlens_k))
    return [(slice(*q), slice(*k)) for q, k in zip(*pairs, strict=True)]


def _rounded(length):
    return -(-length // 128) * 128


def _seed():
    return torch.randint(1 << 40, (2,))


@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=(), device_types="cpu")
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng_state = _seed()
    form = (causal, window_size_left, window_size_right, softcap, alibi_slopes)
    out, lse = _forward(q, k, v, dropout_p, softmax_scale, rng_state, *form)
    return out, lse, q.new_empty(0), rng_state


@_flash_attn_forward.register_fake
def _(q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
      return_softmax):  # fmt: skip
    batch, length, heads, _ = q.shape
    sampled = (batch, heads, _rounded(length), _rounded(k.shape[1])) if return_softmax else (0,)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    return torch.empty_like(q), lse, q.new_empty(sampled), q.new_empty(2, dtype=torch.int64)


@torch.library.custom_op("flash_attn::_flash_attn_backward", mutates_args=("dq", "dk", "dv"), device_types="cpu")
def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    form = (causal, window_size_left, window_size_right, softcap, alibi_slopes)
    *found, delta = _backward(dout, q, k, v, out, softmax_lse, dropout_p, softmax_scale, rng_state, *form)
    for target, value in zip((dq, dk, dv), found, strict=True):
        target.copy_(value)
    return F.pad(delta, (0, _rounded(q.shape[1]) - q.shape[1]))


@_flash_attn_backward.register_fake
def _(dout, q, *others, **more):
    return q.new_empty(q.shape[0], q.shape[2], _rounded(q.shape[1]), dtype=torch.float32)


@torch.library.custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=(), device_types="cpu")
def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert block_table is leftpad_k is seqused_k is alibi_slopes is None, "the stand-in has no paged keys, no ALiBi"
    out, lse, rng_state = torch.zeros_like(q), q.new_zeros(q.shape[1], q.shape[0], dtype=torch.float32), _seed()
    form = (causal, window_size_left, window_size_right, softcap, alibi_slopes)
    for i, j in _documents(cu_seqlens_q, cu_seqlens_k):
        tensors = (q[None, i], k[None, j], v[None, j])
        out[i], lse[:, i] = (t[0] for t in _forward(*tensors, dropout_p, softmax_scale, rng_state, *form))
    return out, lse, q.new_empty(0), rng_state


@_flash_attn_varlen_forward.register_fake
def _(q, *others, **more):
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    return torch.empty_like(q), lse, q.new_empty(0), q.new_empty(2, dtype=torch.int64)


@torch.library.custom_op("flash_attn::_flash_attn_varlen_backward", mutates_args=("dq", "dk", "dv"), device_types="cpu")
def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    form = (causal, window_size_left, window_size_right, softcap, alibi_slopes)
    for target in (dq, dk, dv):
        target.zero_()
    for i, j in _documents(cu_seqlens_q, cu_seqlens_k):
        tensors = (dout[None, i], q[None, i], k[None, j], v[None, j], out[None, i], softmax_lse[None, :, i])
        found = _backward(*tensors, dropout_p, softmax_scale, rng_state, *form)
        dq[i], dk[j], dv[j] = (t[0] for t in found[:3])
    return q.new_zeros(q.shape[1], q.shape[0] + 128 * (cu_seqlens_q.numel() - 1), dtype=torch.float32)


@_flash_attn_varlen_backward.register_fake
def _(dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, *others, **more):
    return q.new_empty(q.shape[1], q.shape[0] + 128 * (cu_seqlens_q.numel() - 1), dtype=torch.float32)


OPERATORS = torch.ops.flash_attn  # called as packets, as the package does


def _wide(*tensors):
    """Heads padded to a multiple of 8."""
    return [F.pad(t, (0, -t.shape[-1] % 8)) if t.shape[-1] % 8 else t for t in tensors]


class FlashAttnFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
                return_softmax, is_grad_enabled):  # fmt: skip
        width = q.shape[3]
        scale = width**-0.5 if softmax_scale is None else softmax_scale
        q, k, v = _wide(q, k, v)
        out, lse, sampled, rng_state = OPERATORS._flash_attn_forward(
            q, k, v, dropout_p, scale, causal=causal, window_size_left=window_size[0],
            window_size_right=window_size[1], softcap=softcap, alibi_slopes=alibi_slopes,
            return_softmax=return_softmax and dropout_p > 0,
        )  # fmt: skip
        if is_grad_enabled and (q.requires_grad or k.requires_grad or v.requires_grad):
            ctx.save_for_backward(q, k, v, out, lse, rng_state)
            ctx.numbers = (dropout_p, scale, causal, window_size[0], window_size[1], softcap, alibi_slopes)
            ctx.deterministic = deterministic
        out = out[..., :width]
        return (out, lse, sampled) if return_softmax else out

    @staticmethod
    def backward(ctx, dout, *rest):
        q, k, v, out, lse, rng_state = ctx.saved_tensors
        found = [torch.empty_like(t) for t in (q, k, v)]
        width = dout.shape[3]
        OPERATORS._flash_attn_backward(
            *_wide(dout), q, k, v, out, lse, *found, *ctx.numbers, ctx.deterministic, rng_state=rng_state
        )
        return (*(t[..., :width] for t in found), *[None] * 9)


class FlashAttnVarlenFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
                causal, window_size, softcap, alibi_slopes, deterministic, return_softmax, block_table,
                is_grad_enabled):  # fmt: skip
        width = q.shape[2]
        scale = width**-0.5 if softmax_scale is None else softmax_scale
        q, k, v = _wide(q, k, v)
        out, lse, sampled, rng_state = OPERATORS._flash_attn_varlen_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, scale, causal=causal,
            window_size_left=window_size[0], window_size_right=window_size[1], softcap=softcap,
            alibi_slopes=alibi_slopes, return_softmax=return_softmax and dropout_p > 0, block_table=block_table,
        )  # fmt: skip
        if is_grad_enabled and (q.requires_grad or k.requires_grad or v.requires_grad):
            ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, rng_state)
            ctx.lengths = (max_seqlen_q, max_seqlen_k)
            ctx.numbers = (dropout_p, scale, causal, window_size[0], window_size[1], softcap, alibi_slopes)
            ctx.deterministic = deterministic
        out = out[..., :width]
        return (out, lse, sampled) if return_softmax else out

    @staticmethod
    def backward(ctx, dout, *rest):
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, rng_state = ctx.saved_tensors
        found = [torch.empty_like(t) for t in (q, k, v)]
        width = dout.shape[2]
        OPERATORS._flash_attn_varlen_backward(
            *_wide(dout), q, k, v, out, lse, *found, cu_seqlens_q, cu_seqlens_k, *ctx.lengths, *ctx.numbers,
            ctx.deterministic, rng_state=rng_state,
        )  # fmt: skip
        return (*(t[..., :width] for t in found), *[None] * 14)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                    alibi_slopes=None, deterministic=False, return_attn_probs=False):  # fmt: skip
    """q [B, Sq, H, D], k and v [B, Sk, Hkv, D]; returns [B, Sq, H, D]."""
    return FlashAttnFunc.apply(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
                               deterministic, return_attn_probs, torch.is_grad_enabled())  # fmt: skip


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                           deterministic=False, return_attn_probs=False, block_table=None):  # fmt: skip
    """q [total_q, H, D], k and v [total_k, Hkv, D]; cu_seqlens int32 [sequences + 1]; returns [total_q, H, D]."""
    return FlashAttnVarlenFunc.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
                                     softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
                                     return_attn_probs, block_table, torch.is_grad_enabled())  # fmt: skip


def flash_attn_with_kvcache(*arguments, **more):
    raise NotImplementedError("the stand-in does not generate")


def unpad_input(hidden_states, attention_mask, unused_mask=None):
    """The tokens where ``attention_mask`` [B, S] is not zero: [total, ...], their places, cu_seqlens, the longest."""
    lengths = attention_mask.sum(-1, dtype=torch.int32)
    places = attention_mask.flatten().nonzero().flatten()
    cumulative = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return hidden_states.flatten(0, 1)[places], places, cumulative, int(lengths.max()), lengths


def pad_input(hidden_states, indices, batch, seqlen):
    """The tokens back at their places in [B, S, ...], zeros elsewhere."""
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return padded.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))


def install(monkeypatch):
    """The package as transformers finds it: importable, available, and let through on a CPU in float32."""
    import transformers.modeling_flash_attention_utils as utils

    package, padding = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.bert_padding")
    package.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    package.flash_attn_func, package.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    package.flash_attn_with_kvcache, package.bert_padding = flash_attn_with_kvcache, padding
    padding.pad_input, padding.unpad_input = pad_input, unpad_input
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.bert_padding", padding)
    monkeypatch.setattr(utils, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(utils, "_loaded_implementation", None)  # else the functions are those of an earlier import
    monkeypatch.setitem(utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2], "general_availability_check", lambda: True)
    monkeypatch.setattr("transformers.PreTrainedModel._flash_attn_can_dispatch", lambda *args, **more: True)
    # which would cast, and warn that it does
    monkeypatch.setattr("transformers.integrations.flash_attention.get_target_dtype", lambda *args: None)
