"""The captured graph as a reference: what it is compared with, when it is not, and that nothing of it stays."""

from __future__ import annotations

import gc
import weakref

import models
import pytest
import torch
from training import padded

import cggr_compile
from cggr_compile import captured_reference, verify


def verified(model, *batches, **options):
    """The reports after a verified step with each batch."""
    models.compiled(model, **{"verify": True, **options})
    for batch in batches or (models.make_batch(),):
        model(**batch).loss.backward()
    return cggr_compile.runtime(model).reports


@pytest.fixture
def compared(monkeypatch):
    """Names of the gradients that were compared, step by step."""
    names = []
    largest = captured_reference._largest_error

    def record(ours, outputs, grads, found):
        names.append([name for name in found if name is not None])
        return largest(ours, outputs, grads, found)

    monkeypatch.setattr(captured_reference, "_largest_error", record)
    return names


@pytest.mark.parametrize("gradient", ["exact", "routed"])
def test_what_is_compared(gradient, compared):
    """All gradients, or those behind the last place where gradient is stopped: once for each graph."""
    model = models.family("llama", num_hidden_layers=2)
    (report,) = verified(model, *[models.make_batch(seed=s) for s in (1, 2)], gradient=gradient)
    assert report.verification.steps == 2 and 0 < report.verification.captured_error < 1e-5
    assert f"{report.verification.captured_error:.1e} from the captured graph" in str(report.verification)
    (names,) = compared
    if gradient == "exact":
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())
        return
    last = "model.layers.1."
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj", "post_attention_layernorm")
    assert {"lm_head.weight", "model.norm.weight", *(f"{last}{part}.weight" for part in parts)} <= set(names)
    assert not any(name.startswith(("model.layers.0", "model.embed")) for name in names)
    assert f"{last}input_layernorm.weight" not in names


KINDS = ["padding", "count", "sliced", "smoothing", "bfloat16", "fused"]


@pytest.mark.parametrize("kind", models.slow_but(["padding", "sliced", "bfloat16", "fused"], KINDS))
def test_every_kind_of_loss(kind):
    options = {"cross_entropy": "fused"} if kind == "fused" else {}
    tolerance = 5e-2 if kind == "bfloat16" else 1e-5
    if kind == "padding":  # which has labels
        reports = verified(models.family("llama", num_hidden_layers=1), padded("right", ignored_labels=False))
    elif kind == "count":
        batch = {**models.make_batch(), "num_items_in_batch": torch.tensor(77)}
        reports = verified(models.PlainLM(), batch)
    elif kind in ("sliced", "smoothing"):
        decoder, batch = models.Decoder(layers=1), models.make_batch()

        def step(ids, labels):
            logits = decoder(ids)[:, 2:-3] if kind == "sliced" else decoder(ids)
            labels = labels[:, 3:-2] if kind == "sliced" else labels
            smoothing = 0.1 if kind == "smoothing" else 0.0
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing)

        models.compiled(step, verify=1, gradient="exact")(*batch.values()).backward()
        reports = cggr_compile.runtime(decoder).reports
    else:
        model = models.PlainLM()
        reports = verified(model.to(torch.bfloat16) if kind == "bfloat16" else model, **options)
    (report,) = reports
    assert report.matched and report.verification.note == "" and report.verification.captured_error < tolerance


@pytest.mark.slow
def test_sizes_that_have_become_numbers():
    model = models.PlainLM()
    reports = verified(model, *[models.make_batch(2, seq) for seq in (16, 20, 24)])
    assert len(reports) > 1 and all(report.matched for report in reports)
    assert all(report.verification.captured_error < 1e-5 for report in reports)


def test_random_numbers_are_not_compared(caplog):
    (report,) = verified(models.family("gpt2", n_layer=1, resid_pdrop=0.3))
    assert report.verification.steps == 1 and report.verification.captured_error is None
    assert report.verification.note == "not compared with the captured graph: it draws random numbers"
    assert "it draws random numbers" in caplog.text


def test_a_batch_without_labels_is_not_compared():
    batch = models.make_batch()
    batch["labels"][:] = -100
    (report,) = verified(models.PlainLM(), batch)
    assert report.verification.note.endswith("no position has a label")


def test_a_loss_inside_of_a_checkpoint_is_not_compared():
    decoder, batch = models.SlicedLoss(layers=1), models.make_batch()

    def step(ids, labels):
        return torch.utils.checkpoint.checkpoint(decoder, ids, labels, use_reentrant=False)

    models.compiled(step, verify=1)(*batch.values()).backward()
    (report,) = cggr_compile.runtime(decoder).reports
    assert report.verification.note.endswith("its cross-entropy is inside of a checkpoint")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_control_a_small_difference_is_seen(what, monkeypatch):
    """One in two hundred of the loss, or of a single gradient, raises, and leaves no gradient behind."""
    run = verify.GradientProbe.run

    def off(self, function, args, state, scale=1.0):
        found = run(self, function, args, state, scale)
        if what == "loss":
            found.outputs[0].mul_(1.005)
        else:
            found.grads[-1].mul_(1.005)
        return found

    monkeypatch.setattr(verify.GradientProbe, "run", off)
    model = models.PlainLM()
    worst = r"output \d" if what == "loss" else "lm_head.weight"
    with pytest.raises(cggr_compile.VerificationError, match=f"the captured one differ in {worst}"):
        verified(model)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("raises", [pytest.param(False, marks=pytest.mark.slow), True])
def test_neither_graph_nor_batch_stays(raises, monkeypatch):
    held = []
    begin = captured_reference.CapturedReference.__init__

    def watched(self, captured, *args):
        held.extend([weakref.ref(self), weakref.ref(captured)])
        begin(self, captured, *args)

    monkeypatch.setattr(captured_reference.CapturedReference, "__init__", watched)
    if raises:
        monkeypatch.setattr(captured_reference, "_ratio", lambda *args: 1.0)
    model, batch = models.PlainLM(), models.make_batch()
    rng = torch.get_rng_state()
    try:
        verified(model, batch)
    except cggr_compile.VerificationError:
        assert raises
    assert torch.equal(torch.get_rng_state(), rng)
    held.append(weakref.ref(batch["input_ids"]))
    del batch
    gc.collect()
    assert len(held) == 3 and all(reference() is None for reference in held)
