"""Batches from files: every form of a line, and what is wrong with bad ones."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cggr_compile.batch_source import IGNORE, read_batches


class Characters:
    """A tokenizer of characters, with a chat template."""

    eos_token = "."

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": ([1] if add_special_tokens else []) + [ord(c) for c in text]}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt=False):
        text = "".join(f"<{m['role'][0]}>{m['content']}" for m in messages)
        return text + ("<a>" if add_generation_prompt else "")


def read(path, size=1, seq=16, count=1, tokenizer=None, vocab=128):
    return read_batches(path, tokenizer, size=size, seq=seq, count=count, vocab=vocab)


def lines(tmp_path, *values):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(v if isinstance(v, str) else json.dumps(v) for v in values))
    return path


def shown(batch):
    """Text and labelled text of the first sequence."""
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    return "".join(map(chr, filter(None, ids))), "".join(chr(one) for one in labels if one != IGNORE)


def test_arrays(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(40).reshape(5, 8))
    batches = read(tmp_path / "a.npy", size=2, seq=10, count=9)
    assert len(batches) == 2 and batches[1]["input_ids"].shape == (2, 10)
    assert batches[1]["input_ids"][0].tolist() == [*range(16, 24), 0, 0]
    assert batches[1]["labels"][0].tolist() == [*range(16, 24), IGNORE, IGNORE]


def test_lines(tmp_path):
    two = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "ab"}]
    path = lines(
        *(tmp_path, {"input_ids": [65, 66], "labels": [IGNORE, 66]}, "", {"text": "hey"}),
        *({"prompt": "what", "answer": "ok"}, {"messages": [*two, *two]}),
    )
    found = [shown(batch) for batch in read(path, count=4, tokenizer=Characters(), seq=32)]
    assert found == [("AB", "B"), ("\1hey", "\1hey"), ("\1whatok.", "ok."), ("\1<u>q<a>ab<u>q<a>ab", "abab")]


def test_the_end_is_kept(tmp_path):
    path = lines(tmp_path, {"prompt": "a long prompt", "answer": "yes"})
    assert shown(read(path, seq=5, tokenizer=Characters())[0]) == ("tyes.", "yes.")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 of"),
        ("[1]", "must be an object"),
        ({"tokens": [1]}, r"got the keys \['tokens'\]"),
        ({"text": "a"}, "needs a tokenizer"),
        ({"input_ids": [1, 2], "labels": [1]}, "2 tokens and 1 labels"),
        ({"input_ids": ["x"]}, "line 1 of"),
        ({"input_ids": [1, 500]}, r"tokens must be in \[0, 128\)"),
        ({"input_ids": [1, 2], "labels": [IGNORE, IGNORE]}, "have no label"),
    ],
)
def test_bad_lines(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        read(lines(tmp_path, line))


def test_bad_files(tmp_path):
    np.save(tmp_path / "f.npy", np.zeros((2, 3)))
    (tmp_path / "x.txt").write_text("")
    for name, message in (("f.npy", "integers"), ("x.txt", ".npy or .jsonl"), ("none.npy", "no such file")):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name)
    with pytest.raises(ValueError, match="has 1 sequences, a batch takes 2"):
        read(lines(tmp_path, {"input_ids": [1, 2]}), size=2)
    with pytest.raises(ValueError, match="seq must be >= 1"):
        read(tmp_path / "f.npy", seq=0)
