"""What is trained at positions without a label learns: prompts, projectors, markers, token rows, input embeddings."""

from __future__ import annotations

from typing import Any

import models
import placed
import pytest
import torch
from models import HIDDEN, SEQ, compiled, make_batch, slow_but
from reference import assert_same, backward, eager_call, reference, shift, worst
from torch import Tensor
from training import complaints, metrics, picks, small

import cggr_compile

LABELS = {"selection": "labels", "max_selected": 1.0, "context": 0, "fallback": "warn"}
ROUTED = ("project", "stop")


def build(name: str, frozen: bool = True) -> tuple[placed.Placed, Tensor, Tensor]:
    embed, shapes, image = (placed.KNOWN | placed.PRODUCTS | placed.UNKNOWN)[name][:3]
    return placed.Placed(embed, shapes, frozen), *placed.batch(image)


def parts(model: placed.Placed) -> list[str]:
    return [name for name, _ in model.named_parameters(recurse=False)]


# Of each way to place them one; tests/passes/semantic/test_trained_inputs.py looks for all of them in the graph.
QUICK_KNOWN = [
    *("prefix", "nested", "encoded", "sliced", "chosen", "scattered", "in_a_block", "rows_copied"),
    *("chosen_by_each", "adapted", "expert_of_blanked"),
]
# PyTorch itself cannot trace the backward of index_put with a mask
TRACED = {name: case for name, case in (placed.KNOWN | placed.PRODUCTS).items() if name != "put"}


@pytest.mark.parametrize("name", slow_but(QUICK_KNOWN, TRACED))
def test_known_positions_carry_gradient(name: str) -> None:
    """The rest of the model is trained or frozen, in turns."""
    index = list(TRACED).index(name)
    kv = ROUTED[index % 2]
    model, ids, labels = build(name, frozen=index % 3 > 0)
    compiled(model, kv_gradient=kv, **LABELS)
    got = backward(model, model(ids, labels))
    assert metrics(model)["matched"] and metrics(model)["context_overflow"] == 0
    assert cggr_compile.runtime(model).reports[-1].gradient == "routed"

    def again(extra: Tensor | None) -> Any:
        target = shift(labels)
        return reference(model, lambda: model.logits(ids), target, picks(model), kv_gradient=kv, extra=extra)

    assert_same(got, again(placed.positions(name)))
    without = again(None)
    for part in parts(model):
        assert got.grads[part].norm() > 0
        if name != "suffix":  # whose positions have labels in this batch
            assert without.grads[part].norm() < 0.5 * got.grads[part].norm(), "a check that cannot fail"


@pytest.mark.parametrize("name", slow_but(["reordered", "put_in_place", "marked_by_others"], placed.UNKNOWN))
def test_unknown_positions(name: str) -> None:
    """``auto`` becomes exact, and says so; ``routed`` is obeyed, and says so."""
    for gradient, taken in (("auto", "exact"), ("routed", "routed")):
        torch._dynamo.reset()
        model, ids, labels = build(name)
        compiled(model, gradient=gradient, **LABELS)
        with complaints() as said:
            got = backward(model, model(ids, labels))
        (told,) = [text for text in said if parts(model)[0] in text]
        assert cggr_compile.runtime(model).reports[-1].gradient == taken
        assert_same(got, reference(model, lambda: model.logits(ids), shift(labels), picks(model), gradient=taken))  # noqa: B023
        assert taken == "routed" or got.grads[parts(model)[0]].norm() > 0
        assert ("gradient='exact' for this graph" in told) == (taken == "exact")


OTHERS = [{"verify": 1}, {"row_sparse": False}, {"cross_entropy": "fused"}]


@pytest.mark.parametrize("options", slow_but([OTHERS[0], OTHERS[2]], OTHERS), ids=str)
def test_other_options(options: dict[str, Any]) -> None:
    """A random part of the labels, unused slots, weights at keys and values."""
    model, ids, labels = build("scattered", frozen=False)
    labels[0, 10:] = -100
    weight = "1/sqrt(p)"
    compiled(model, min_tokens_ratio=0.3, selection="random", kv_weight=weight, fallback="warn", **options)
    got = backward(model, model(ids, labels))
    assert metrics(model)["matched"] and metrics(model)["tokens_selected"] < metrics(model)["tokens_total"]
    assert (cggr_compile.runtime(model).selected < 0).any()
    extra, chosen = placed.positions("scattered"), picks(model)
    run = lambda **k: reference(model, lambda: model.logits(ids), shift(labels), chosen, extra=extra, **k)  # noqa: E731
    assert_same(got, run(kv_weight=weight))
    assert worst(got, run())[0] > 0.01, "a check that cannot fail"
    if "verify" in options:
        assert metrics(model)["verify_steps"] == 1


def test_positions_that_are_selected_too() -> None:
    """Every position has a label: a prompt's rows carry gradient once, whether selected or not."""
    model, ids, _ = build("prefix", frozen=False)
    compiled(model, min_tokens_ratio=0.5, selection="random", kv_weight="1/sqrt(p)")
    got = backward(model, model(ids, ids))
    chosen = picks(model)
    assert (chosen.rows[chosen.rows >= 0] < placed.PROMPT).any()
    extra = placed.positions("prefix")
    run = reference(model, lambda: model.logits(ids), shift(ids), chosen, extra=extra, kv_weight="1/sqrt(p)")
    assert_same(got, run)


def test_overflow_is_counted_and_told() -> None:
    """More images than the first batch had: the last positions have no slot."""
    model, ids, labels = build("marked")
    compiled(model, selection="labels", max_selected=8, context=0)
    many = torch.where(torch.arange(SEQ) < SEQ - 1, placed.IMAGE, ids)
    with complaints() as said:
        backward(model, model(ids, labels))
        assert metrics(model)["context_overflow"] == 0
        slots = cggr_compile.runtime(model).reports[-1].record("trained_inputs").details["slots"]
        got = backward(model, model(many, labels))
    assert slots == 6 and not any("context_overflow" in text for text in said)
    # a sequence has 7 images that are not selected: 0 to 6
    extra = (torch.arange(SEQ) < slots).expand(2, -1)
    assert metrics(model)["context_overflow"] == 2
    assert_same(got, reference(model, lambda: model.logits(many), shift(labels), picks(model), extra=extra))
    with complaints() as said:
        for _ in range(3):
            model(many, labels)
    assert metrics(model)["context_overflow"] == 2 * 4
    assert len([text for text in said if "context_overflow" in text]) == 1


def test_input_embeddings_get_their_gradient() -> None:
    model, batch = small(), make_batch()
    given = torch.randn(2, SEQ, HIDDEN, generator=torch.Generator().manual_seed(2)).requires_grad_()
    compiled(model, min_tokens_ratio=0.25, fallback="warn")
    with complaints() as said:
        loss = model(inputs_embeds=given, labels=batch["labels"]).loss
    assert metrics(model)["matched"] is True, metrics(model)
    assert any("inputs_embeds" in text and "exact" in text for text in said)
    (grad,) = torch.autograd.grad(loss, given)
    logits = lambda: eager_call(model, inputs_embeds=given, use_cache=False).logits  # noqa: E731
    reference(model, logits, shift(batch["labels"]), picks(model), gradient="exact")
    torch.testing.assert_close(grad, given.grad, atol=1e-5, rtol=1e-4)
    assert (grad.abs().sum(-1) > 0).sum() > 2 * 4


@pytest.mark.slow
def test_generated_code() -> None:
    model, ids, labels = build("prefix")
    compiled(model, compiler="inductor", kv_gradient="stop", **LABELS)
    got = backward(model, model(ids, labels))
    run = reference(
        *(model, lambda: model.logits(ids), shift(labels), picks(model)),
        kv_gradient="stop",
        extra=placed.positions("prefix"),
    )
    assert_same(got, run)


PROMPT_TUNING = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}


@pytest.mark.parametrize("kind", ["PromptTuningConfig", pytest.param("PromptEncoderConfig", marks=pytest.mark.slow)])
def test_peft_prompts(kind: str) -> None:
    peft = pytest.importorskip("peft")
    model = models.randomise(peft.get_peft_model(small(), getattr(peft, kind)(**PROMPT_TUNING)))
    batch = make_batch()
    compiled(model, **LABELS)
    with complaints() as said:
        got = backward(model, model(**batch).loss)
    assert metrics(model)["matched"] is True, metrics(model)
    assert not any("gradient=" in text for text in said)
    ids, none = batch["input_ids"], torch.full((2, 4), -100)
    target = shift(torch.cat([none, batch["labels"]], 1))
    extra = (torch.arange(SEQ + 4) < 4).expand(2, -1)
    logits = lambda: eager_call(model, input_ids=ids, use_cache=False).logits  # noqa: E731
    assert_same(got, reference(model, logits, target, picks(model), extra=extra))
    assert all(grad.norm() > 0 for name, grad in got.grads.items() if "embedding" in name)


def test_peft_token_rows() -> None:
    peft = pytest.importorskip("peft")
    batch = make_batch()
    batch["input_ids"][:, 2:5] = 7
    batch["labels"][:, :8] = -100
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], trainable_token_indices={"embed_tokens": [7]})
    model = models.randomise(peft.get_peft_model(small(), config))
    compiled(model, **LABELS)
    got = backward(model, model(**batch).loss)
    assert metrics(model)["matched"] is True, metrics(model)
    logits = lambda: eager_call(model, input_ids=batch["input_ids"], use_cache=False).logits  # noqa: E731
    extra = batch["input_ids"] == 7
    assert_same(got, reference(model, logits, shift(batch["labels"]), picks(model), extra=extra))
    (delta,) = [grad for name, grad in got.grads.items() if "trainable_tokens_delta" in name]
    assert delta.norm() > 0


def test_llava(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trained projector between a vision model and a decoder of transformers."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")  # its checks of a batch break the graph
    text = dict(model_type="llama", vocab_size=models.VOCAB, hidden_size=HIDDEN, intermediate_size=64)
    text |= dict(num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
    vision = dict(model_type="clip_vision_model", hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    vision |= dict(num_attention_heads=2, image_size=8, patch_size=4, projection_dim=16)
    config = dict(text_config=text, vision_config=vision, image_token_index=5, vision_feature_layer=-1)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(image_seq_length=4, **config))
    models.randomise(model).requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    ids = torch.randint(6, models.VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(1))
    ids[:, 2:6] = 5
    labels = torch.where(torch.arange(SEQ) < 9, -100, ids)
    batch = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))}
    with torch.no_grad():
        model(**batch)  # installs hooks of transformers, which would break the graph
    compiled(model, **LABELS)
    with complaints() as said:
        got = backward(model, model(**batch, labels=labels).loss)
    assert metrics(model)["matched"] is True, metrics(model)
    assert not any("gradient=" in text or "every position" in text for text in said)
    logits = lambda: eager_call(model, use_cache=False, **batch).logits  # noqa: E731
    decoder = Decoder(model)
    assert_same(got, reference(decoder, logits, shift(labels), picks(model), extra=ids == 5))
    assert all(grad.norm() > 0 for grad in got.grads.values())


class Decoder(torch.nn.Module):
    """The parameters of a LLaVA model under their names, and the modules of its decoder only: what is routed."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.language_model = model.model.language_model
        self.named_parameters = model.named_parameters  # type: ignore[method-assign]
