"""FlexAttention on a GPU, its backward dense and on rows, against the reference on the CPU."""

from __future__ import annotations

import copy

import models
import pytest
import torch
import torch.nn.attention.flex_attention as flex
from reference import Picks, hf_reference

import cggr_compile

LENGTH = 200  # one full block, and a part of the next
DOCUMENTS = torch.arange(LENGTH) >= 70
POSITIONS = torch.where(DOCUMENTS, torch.arange(LENGTH) - 70, torch.arange(LENGTH)).expand(2, -1)


@pytest.mark.parametrize("kv_gradient", ["stop", "project"])
@pytest.mark.parametrize("devices", [(), ("cuda",)], ids=["dense", "rows"])
def test_equals_the_reference(devices, kv_gradient, monkeypatch):
    monkeypatch.setattr("cggr_compile.passes.patterns.attention.flex.DEVICES", devices)
    sizes = dict(num_hidden_layers=2, head_dim=16, use_cache=False, max_position_embeddings=256)
    reference = models.family("llama", attn_implementation="sdpa", **sizes)
    model = copy.deepcopy(reference).cuda()
    model.set_attn_implementation("flex_attention")
    options = dict(compiler="inductor", fallback="warn", kv_gradient=kv_gradient)
    models.compiled(model, **options)
    documents = DOCUMENTS.cuda()
    blocks = flex.create_block_mask(
        lambda b, h, q, k: (k <= q) & (documents[q] == documents[k]), None, None, LENGTH, LENGTH, device="cuda"
    )
    batch = {**models.make_batch(2, LENGTH), "position_ids": POSITIONS}
    with torch._inductor.utils.fresh_cache():  # its key does not know the devices
        loss = model(**{name: value.cuda() for name, value in batch.items()}, attention_mask=blocks).loss
        loss.backward()
    runtime = cggr_compile.runtime(model)
    (record,) = (p for p in runtime.reports[-1].passes if p.name == "row_sparse")
    assert record.details["dense_attention"] == ({} if devices else {"FlexAttention on cuda": 2})
    picks = Picks(runtime.selected.cpu(), runtime.weights.cpu())
    expected = hf_reference(reference, batch, picks, kv_gradient=kv_gradient)
    gap = sum(float((p.grad.cpu() - expected.grads[n]).double().square().sum()) for n, p in model.named_parameters())
    assert gap**0.5 < 1e-4 * expected.norm()
