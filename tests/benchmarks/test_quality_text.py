"""The text of quality.py: split by file, without copies; labels on answers."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("tokenizers")

import numpy as np
import quality_text
import torch
from quality_text import IGNORE, Blocks


def lines(start: int, count: int) -> str:
    return "\n".join(f"a line of text, long enough to count, number {start + i}" for i in range(count))


def test_files_are_read_once_and_only_text(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    for name, text in {
        "a.py": lines(0, 9),
        "copy.md": lines(0, 9) + "\n",
        "b.txt": lines(50, 9),
        "image.png": lines(99, 9),
        "short.py": "x",
    }.items():
        (tmp_path / "inner" / name).write_text(text)
    (tmp_path / "latin.py").write_bytes(b"\xff" * 400)
    found = quality_text.read_files([tmp_path, tmp_path / "inner"], 10**6)
    assert sorted(text.strip() for text in found.values()) == [lines(0, 9), lines(50, 9)]
    assert list(found) == sorted(found)
    assert len(quality_text.read_files([tmp_path], 600)) == 1


def test_held_out_files_are_new() -> None:
    files = {f"{number:08x}": lines(100 * number, 20) for number in range(120)}
    files[f"{40:08x}"] = lines(100, 20)  # as file 1
    files[f"{80:08x}"] = lines(200, 9) + "\n" + lines(8000, 11)  # a part of file 2
    train, held_out = quality_text.split(files)
    assert list(held_out) == [f"{0:08x}", f"{80:08x}"]
    assert len(train) == 117


def test_tokens_and_labels() -> None:
    texts = quality_text._gsm8k_texts("test")[:200]
    tokenizer = quality_text.train_tokenizer(texts, 400)
    tokens = quality_text.encode(texts * 6, tokenizer)  # more than one batch
    assert tokens.dtype == np.uint16 and tokenizer.decode(tokens[:100].tolist(), skip_special_tokens=False) in texts[0]
    whole, answers = (quality_text.gsm8k("test", tokenizer, 128, answers_only=only) for only in (False, True))
    assert (whole.labels == whole.ids).all() and (answers.ids == whole.ids).all()
    known = answers.labels != IGNORE
    assert (answers.labels[known] == answers.ids[known]).all() and 0.2 < known.float().mean() < 0.8
    first = tokenizer.decode(answers.labels[0][known[0]].tolist(), skip_special_tokens=False)
    assert texts[0].partition("\n")[2].startswith(first[:40]), "the first label is the answer's first token"
    prompted = quality_text.gsm8k("test", tokenizer, 128, answers_only=True, shots=2)
    assert prompted.share == pytest.approx(answers.share / 3, rel=0.05) and whole.share == 1.0
    train, held_out = (quality_text.gsm8k(part, tokenizer, 64, shots=1, same_prompt=True) for part in ("train", "test"))
    prompt = tokenizer.encode(quality_text._gsm8k_texts("train")[0]).ids
    for blocks in (train, held_out):
        assert blocks.ids.flatten()[: len(prompt)].tolist() == prompt
    assert train.share == 1.0 and (held_out.labels.flatten()[: len(prompt)] == IGNORE).all()
    assert held_out.labels.flatten()[len(prompt)] == whole.ids.flatten()[0]


def test_usual_labels() -> None:
    """95 of 100 sequences have as many or fewer; the label of the first position does not count."""
    labels = torch.where(torch.arange(101) <= torch.arange(100)[:, None], 1, IGNORE)  # n + 1 labels, n that count
    assert Blocks(labels, labels).usual_labels == 94
