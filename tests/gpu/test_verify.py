"""``verify`` on an accelerator: its kernels, its number formats."""

from __future__ import annotations

import contextlib

import models
import pytest
import torch
from row_sparse_comparison import LosesTheSign

import cggr_compile
from cggr_compile.passes.joint.row_sparse import rules

KINDS = ["float32", "tf32", "float16", "bfloat16", "autocast"]


def verified(family, kind, **options):
    model = models.family(family, **({"resid_pdrop": 0.2} if family == "gpt2" else {})).cuda()
    if kind in ("float16", "bfloat16"):
        model = model.to(getattr(torch, kind))
    models.compiled(model, compiler="inductor", verify=True, **options)
    batch = {name: tensor.cuda() for name, tensor in models.make_batch(4, 64).items()}
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
    try:
        with torch.autocast("cuda", torch.bfloat16) if kind == "autocast" else contextlib.nullcontext():
            for _ in range(2):
                model(**batch).loss.backward()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return cggr_compile.runtime(model)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_passes(family, kind):
    # rounding may change what the router selects, and such a step cannot be compared
    rt = verified(family, kind, selection="random")
    tolerance = rt.reports[0].verification.tolerance
    assert rt.metrics()["verify_steps"] == 2 and 0 < rt.metrics()["verify_max_error"] < tolerance


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_control_a_wrong_rule_is_caught(kind, monkeypatch):
    monkeypatch.setitem(rules.RULES, torch.ops.aten.neg.default, LosesTheSign())
    # the rule is patched, the sources are not: a graph from the cache would be a right one
    with torch._inductor.utils.fresh_cache(), pytest.raises(cggr_compile.VerificationError):
        verified("llama", kind, kv_gradient="stop")


def test_does_not_disturb_the_generators():
    states = []
    for verify in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(3)
        model = models.compiled(models.family("gpt2", resid_pdrop=0.2).cuda(), compiler="inductor", verify=verify)
        batch = {name: tensor.cuda() for name, tensor in models.make_batch(4, 64).items()}
        for _ in range(2):
            model(**batch).loss.backward()
        states.append((torch.get_rng_state(), torch.cuda.get_rng_state()))
    assert all(torch.equal(*pair) for pair in zip(*states, strict=True))
