"""The package flash-attn with its own kernels: training as close to float32's as with PyTorch's attention in 16 bits.

tests/semantics/test_flash_attn.py has every form of its operators, by a stand-in on the CPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import models
import pytest
import torch
from reference import Picks, Run, backward, dense, errors, hf_reference, overall
from torch.profiler import ProfilerActivity, profile
from training import metrics

import cggr_compile

DEVICE, DTYPE = "cuda", torch.bfloat16
PRECISION = torch.finfo(DTYPE).eps
# enough of them that flash-attn does not split the keys among blocks, as it does to generate
BATCH, LENGTH = 8, 512
SIZES = dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=64, intermediate_size=512)
LENGTHS = [300, 512, 212]  # of the packed sequences


class Case(NamedTuple):
    """A family, PyTorch's attention that computes the same, and what else makes the model, the batch and the step."""

    family: str
    other: str
    config: dict[str, Any]
    kv_gradient: str
    packed: bool = False


# SDPA has no soft-cap
CASES = {
    "causal": Case("llama", "sdpa", {}, "project"),
    "window": Case("mistral", "sdpa", {"sliding_window": 100}, "stop"),
    "soft-cap": Case(
        "gemma2",
        "eager",
        {"attn_logit_softcapping": 2.0, "sliding_window": 100, "query_pre_attn_scalar": 64},
        "project",
    ),
    "packed": Case("llama", "sdpa", {}, "stop", packed=True),
}


@pytest.fixture(autouse=True)
def installed():
    """FlashAttention-4 has the same name; its module for the second is missing."""
    pytest.importorskip("flash_attn.flash_attn_interface", exc_type=ImportError)


def build(case: Case, attention: str, dtype: torch.dtype):
    """The same model, whatever the attention: its weights are exact in 16 bits."""
    sizes = SIZES | {"max_position_embeddings": 1024, "use_cache": False, **case.config}
    model = models.family(case.family, attn_implementation=attention, **sizes)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.25 if p.dim() > 1 else 1.0)  # wider than the family is elsewhere
    return model.to(DTYPE).to(DEVICE, dtype)


def batches(case: Case):
    """For flash-attn, and for PyTorch, which needs a mask to keep packed sequences apart."""
    if not case.packed:
        batch = {name: tensor.to(DEVICE) for name, tensor in models.make_batch(BATCH, LENGTH).items()}
        return batch, batch
    total = sum(LENGTHS)
    batch = models.make_batch(1, total) | {"position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None]}
    batch = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
    ends = torch.tensor(LENGTHS).cumsum(0)
    starts = torch.nn.functional.pad(ends, (1, 0)).to(DEVICE, torch.int32)
    lengths = dict(cu_seq_lens_q=starts, cu_seq_lens_k=starts.clone(), max_length_q=512, max_length_k=512)
    document = (torch.arange(total)[:, None] >= ends).sum(1)
    mask = (document[:, None] == document) & torch.ones(total, total, dtype=torch.bool).tril()
    return batch | lengths, batch | {"attention_mask": mask[None, None].to(DEVICE)}


def assert_as_accurate(run: Run, other: Run, exact: Run):
    """``run`` is at most twice as far from ``exact``, of float32, as ``other`` is: as a whole, and part by part."""
    assert overall(other, exact) < 0.05, "the bound would mean nothing"
    assert overall(run, exact) < 2 * overall(other, exact)
    found, allowed = errors(run, exact), errors(other, exact)
    worse = {name: (error, allowed[name]) for name, error in found.items() if error > 2 * max(allowed[name], PRECISION)}
    assert not worse


def operators(step) -> set[str]:
    """Names of flash-attn's operators that a step runs."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    names = {event.key for event in found.key_averages() if event.key.startswith("flash_attn::")}
    return {name.removeprefix("flash_attn::_flash_attn_").removeprefix("varlen_") for name in names}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_selected_rows(case):
    """Nothing stays dense: the package's own backward does not run."""
    model, (batch, masked) = build(case, "flash_attention_2", DTYPE), batches(case)
    models.compiled(model, compiler="inductor", min_tokens_ratio=0.25, kv_gradient=case.kv_gradient)
    run = backward(model, model(**batch).loss)
    runtime = cggr_compile.runtime(model)
    assert metrics(model)["level"] == "routed"
    details = runtime.reports[-1].record("row_sparse").details
    assert details["dense_attention"] == details["densified"] == {}
    picks = Picks(runtime.selected.clone(), runtime.weights.clone())
    other, exact = (
        hf_reference(build(case, case.other, dtype), masked, picks, kv_gradient=case.kv_gradient)
        for dtype in (DTYPE, torch.float32)
    )
    assert_as_accurate(run, other, exact)
    assert operators(lambda: model(**batch).loss.backward()) == {"forward"}


@pytest.mark.parametrize("name", ["causal", "packed"])
def test_all_rows(name):
    """At ratio 1 the step is the model's own, by the package's two operators."""
    case = CASES[name]
    model, (batch, masked) = build(case, "flash_attention_2", DTYPE), batches(case)
    models.compiled(model, compiler="inductor", min_tokens_ratio=1.0)
    run = backward(model, model(**batch).loss)
    other, exact = (dense(build(case, case.other, dtype), masked) for dtype in (DTYPE, torch.float32))
    assert_as_accurate(run, other, exact)
    assert operators(lambda: model(**batch).loss.backward()) == {"forward", "backward"}
