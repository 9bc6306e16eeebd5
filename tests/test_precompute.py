"""``python -m cggr_compile reference-loss``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

import models
import numpy as np

from cggr_compile.__main__ import main

VOCAB = models.VOCAB


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("reference")
    for number in range(2):
        model = models.family("llama", num_hidden_layers=1)
        with torch.no_grad():
            model.lm_head.weight.mul_(1 - 2 * number)  # two different ones
        model.save_pretrained(folder / f"model{number}")
    tokens = np.random.default_rng(0).integers(0, VOCAB, (5, 12)).astype(np.uint16)
    np.save(folder / "tokens.npy", tokens)
    labels = tokens.astype(np.int32)
    labels[:, :6] = -100
    np.save(folder / "labels.npy", labels)
    return {path.stem: path for path in folder.iterdir()} | {"folder": folder}


def run(files: dict[str, Path], names: list[str], *more: str) -> np.ndarray:
    out = files["folder"] / "loss.npy"
    arguments = [*(str(files[name]) for name in names), f"--tokens={files['tokens']}", f"--out={out}", "--batch=2"]
    assert main(["reference-loss", *arguments, *more]) == 0
    assert not list(files["folder"].glob("*.part"))
    return np.load(out)


def expected(files: dict[str, Path], name: str) -> np.ndarray:
    """At position t the loss on token t + 1; 0 at the end."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(files[name]).eval()
    ids = torch.from_numpy(np.load(files["tokens"]).astype("int64"))
    with torch.no_grad():
        log_p = model(ids).logits.log_softmax(-1)
    return F.pad(-log_p[:, :-1].gather(-1, ids[:, 1:, None])[..., 0], (0, 1)).numpy()


def test_one_model(files) -> None:
    found = run(files, ["model0"])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected(files, "model0"), rtol=1e-4, atol=1e-5)


def test_several_models(files) -> None:
    each = [expected(files, name) for name in ("model0", "model1")]
    assert not np.allclose(*each)
    np.testing.assert_allclose(run(files, ["model0", "model1"]), sum(each) / 2, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        run(files, ["model0", "model1"], "--combine=min"), np.minimum(*each), rtol=1e-4, atol=1e-5
    )


def test_labels_of_their_own(files) -> None:
    found, want = run(files, ["model0"], f"--labels={files['labels']}"), expected(files, "model0")
    np.testing.assert_allclose(found[:, 5:], want[:, 5:], rtol=1e-4, atol=1e-5)
    assert (found[:, :5] == 0).all()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((2, 3), np.float32), r"tokens must be integers \[N, S\], got float32"),
        (np.zeros(3, np.int64), r"tokens must be integers \[N, S\]"),
        (np.full((2, 3), VOCAB), rf"tokens must be in \[0, {VOCAB}\)"),
    ],
    ids=str,
)
def test_wrong_tokens(files, tmp_path, capsys, tokens, message) -> None:
    np.save(tmp_path / "wrong.npy", tokens)
    arguments = [str(files["model0"]), f"--tokens={tmp_path / 'wrong.npy'}", f"--out={tmp_path / 'loss.npy'}"]
    assert main(["reference-loss", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "loss.npy").exists()


def test_no_model_is_downloaded(files, tmp_path, capsys) -> None:
    arguments = ["some/model", f"--tokens={files['tokens']}", f"--out={tmp_path / 'loss.npy'}"]
    assert main(["reference-loss", *arguments]) == 2
    assert "no such folder: some/model" in capsys.readouterr().err
