"""Which attention a model gets, and that nothing else changes."""

from __future__ import annotations

import logging

import pytest
import torch

transformers = pytest.importorskip("transformers")

from models import family, make_batch  # noqa: E402

import cggr_compile  # noqa: E402


def attention(model):
    return model.config._attn_implementation


def test_auto_takes_sdpa_on_the_cpu_and_says_why(caplog):
    model = family("llama")
    model.set_attn_implementation("eager")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        assert cggr_compile.enable_flash_attention(model) is model
    assert attention(model) == "sdpa"
    assert "attention: sdpa; not flash_attention_2: it needs a CUDA device, the model is on cpu" in caplog.text
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert attention(family("llama")) == "sdpa"  # the default: no other model has been touched


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_name_is_taken_as_it_is(backend):
    model, batch = family("llama"), make_batch()
    want = model(**batch).loss
    assert attention(cggr_compile.enable_flash_attention(model, backend)) == backend
    torch.testing.assert_close(model(**batch).loss, want)


def test_what_cannot_work_is_refused_with_the_reason(monkeypatch):
    with pytest.raises(ValueError, match=r"backend must be one that works here.*needs a CUDA device"):
        cggr_compile.enable_flash_attention(family("llama"), "flash_attention_2")
    with pytest.raises(ValueError, match=r"backend must be one of \['auto', 'flash_attention_2', 'sdpa', 'eager'\]"):
        cggr_compile.enable_flash_attention(family("llama"), "flash")
    with pytest.raises(ValueError, match="must be a transformers model, got Linear"):
        cggr_compile.enable_flash_attention(torch.nn.Linear(1, 1))
    model = family("llama")
    monkeypatch.setattr(type(model), "_supports_sdpa", False)
    assert attention(cggr_compile.enable_flash_attention(model)) == "eager"


class OnDevice(torch.nn.Module):
    """What the choice looks at of a model."""

    _supports_flash_attn = _supports_sdpa = True

    def __init__(self, device, dtype):
        super().__init__()
        self.place = type("Place", (), {"device": torch.device(device), "dtype": dtype})
        self.taken = []

    def parameters(self, recurse=True):
        return iter([self.place])

    def set_attn_implementation(self, name):
        self.taken.append(name)


@pytest.mark.parametrize(
    ("dtype", "installed", "expected"),
    [(torch.bfloat16, True, "flash_attention_2"), (torch.float32, True, "sdpa"), (torch.float16, False, "sdpa")],
)
def test_on_cuda(monkeypatch, dtype, installed, expected):
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: installed)
    model = OnDevice("cuda", dtype)
    cggr_compile.enable_flash_attention(model)
    assert model.taken == [expected]


def test_load(tmp_path):
    family("llama").save_pretrained(tmp_path)
    model = cggr_compile.load_model_with_flash_attention(str(tmp_path), dtype=torch.bfloat16)
    assert attention(model) == "sdpa" and model.dtype == torch.bfloat16
    assert attention(cggr_compile.load_model_with_flash_attention(str(tmp_path), backend="eager")) == "eager"
    with pytest.raises(ValueError, match="attn_implementation must be left out"):
        cggr_compile.load_model_with_flash_attention(str(tmp_path), attn_implementation="eager")
