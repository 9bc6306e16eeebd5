"""FlashAttention-4 as what PyTorch's flash attention runs: the forward is its, the row backward reads its logsumexp."""

from __future__ import annotations

import functools

import models
import pytest
import torch
from torch.nn import attention

import cggr_compile


@pytest.fixture
def calls(monkeypatch):
    """Calls of FlashAttention-4's forward, which is active meanwhile."""
    module = pytest.importorskip("flash_attn.cute.interface", exc_type=ImportError)
    made, forward = [], module._flash_attn_fwd

    @functools.wraps(forward)  # its cache of compiled kernels is an attribute
    def counted(*args, **more):
        made.append(1)
        return forward(*args, **more)

    monkeypatch.setattr(module, "_flash_attn_fwd", counted)
    attention.activate_flash_attention_impl("FA4")
    yield made
    attention.restore_flash_attention_impl()


@pytest.mark.parametrize("kv_gradient", ["stop", "project"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_row_backward_reads_its_logsumexp(calls, heads, kv_gradient):
    """``verify`` compares with the same forward and the implementation's own dense backward."""
    sizes = dict(hidden_size=256, num_attention_heads=heads[0], num_key_value_heads=heads[1], head_dim=64)
    model = models.family("llama", **sizes, attn_implementation="sdpa").to("cuda", torch.bfloat16)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.25 if p.dim() > 1 else 1.0)  # wider than the family is elsewhere
    models.compiled(model, compiler="inductor", verify=True, selection="random", kv_gradient=kv_gradient)
    batch = {name: tensor.cuda() for name, tensor in models.make_batch(4, 256, ignored=False).items()}
    # not cuDNN, which comes first on Hopper; others are for the mask that transformers' graph has before the passes
    kinds = attention.SDPBackend
    with attention.sdpa_kernel([kinds.FLASH_ATTENTION, kinds.EFFICIENT_ATTENTION, kinds.MATH]):
        for _ in range(2):
            model(**batch).loss.backward()
    rt = cggr_compile.runtime(model)
    assert rt.metrics()["verify_steps"] == 2 and len(calls) >= 2 * model.config.num_hidden_layers
    assert not rt.reports[0].record("row_sparse").details["dense_attention"]
