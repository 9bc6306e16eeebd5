"""Batches out of the files that the command line names: token ids, texts, prompts with answers, conversations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
FORMS = '{"input_ids": [...]}, {"text": ...}, {"prompt": ..., "answer": ...} or {"messages": [...]}'


def read_batches(
    path: str | Path, tokenizer: Any, *, size: int, seq: int, count: int, vocab: int
) -> list[dict[str, Tensor]]:
    """The first batches of a file, as the arguments of a model: ``input_ids`` and ``labels``, int64 [size, seq].

    Sequences are cut to their last ``seq`` tokens, and filled up on the right without a label.

    Args:
        path: a ``.npy`` file of integers [N, S], every token of which has a label; or a ``.jsonl`` file with a line for
            each sequence, in one of these forms: ``input_ids``, with ``labels`` of the same length or without;
            ``text``; ``prompt`` and ``answer``; ``messages`` with ``role`` and ``content``. Of the last two the
            assistant's tokens have a label.
        tokenizer: for lines of text; may be None otherwise.
        count: at most so many. vocab: the model's.

    Raises:
        ValueError: the file, or a line of it, cannot be read so, or has other tokens than the model.
    """
    for name, value in (("batch", size), ("seq", seq), ("count", count)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    sequences = _sequences(Path(path), tokenizer, size * count)
    if len(sequences) < size:
        raise ValueError(f"data: {path} has {len(sequences)} sequences, a batch takes {size}")
    batches = []
    for begin in range(0, len(sequences) - size + 1, size):
        chosen = sequences[begin : begin + size]
        ids, labels = torch.zeros(size, seq, dtype=torch.int64), torch.full((size, seq), IGNORE)
        for row, (tokens, targets) in enumerate(chosen):
            tokens, targets = tokens[-seq:], targets[-seq:]
            ids[row, : len(tokens)], labels[row, : len(targets)] = torch.tensor(tokens), torch.tensor(targets)
        if int(ids.min()) < 0 or int(ids.max()) >= vocab:
            raise ValueError(
                f"data: tokens must be in [0, {vocab}), the model's vocabulary; {path} has {int(ids.max())}"
            )
        if not bool((labels[:, 1:] != IGNORE).any()):
            raise ValueError(
                f"data: sequences {begin} to {begin + size - 1} of {path} have no label in their last {seq}"
            )
        batches.append({"input_ids": ids, "labels": labels})
    return batches


def _sequences(path: Path, tokenizer: Any, most: int) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels."""
    if not path.is_file():
        raise ValueError(f"data must be a .npy or .jsonl file; no such file: {path}")
    if path.suffix == ".npy":
        import numpy as np

        array = np.load(path, mmap_mode="r")
        if array.ndim != 2 or array.dtype.kind not in "iu":
            raise ValueError(f"data must be integers [N, S], got {array.dtype} {list(array.shape)} in {path}")
        return [(row, row) for row in array[:most].tolist()]
    if path.suffix != ".jsonl":
        raise ValueError(f"data must be a .npy or .jsonl file, got {path}")
    found: list[tuple[list[int], list[int]]] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if len(found) == most:
                break
            if not line.strip():
                continue
            try:
                tokens, labels = _tokens(json.loads(line), tokenizer)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"data: line {number} of {path}: {error}") from error
            if len(tokens) != len(labels) or not tokens:
                raise ValueError(f"data: line {number} of {path}: {len(tokens)} tokens and {len(labels)} labels")
            found.append((tokens, labels))
    return found


def _tokens(line: Any, tokenizer: Any) -> tuple[list[int], list[int]]:
    if not isinstance(line, dict):
        raise ValueError(f"must be an object like {FORMS}")
    if "input_ids" in line:
        return list(map(int, line["input_ids"])), list(map(int, line.get("labels") or line["input_ids"]))
    if not ({"text", "messages"} & set(line) or {"prompt", "answer"} <= set(line)):
        raise ValueError(f"must be like {FORMS}, got the keys {sorted(line)}")
    if tokenizer is None:
        raise ValueError("text needs a tokenizer, and there is none in the model's folder: give input_ids")
    if "text" in line:
        ids = tokenizer(line["text"])["input_ids"]
        return ids, ids
    if "messages" in line:
        return _join(_turns(line["messages"], tokenizer), tokenizer)
    return _join([(line["prompt"], False), (line["answer"] + (tokenizer.eos_token or ""), True)], tokenizer)


def _turns(messages: Sequence[dict[str, str]], tokenizer: Any) -> list[tuple[str, bool]]:
    """The text of a conversation in pieces, and whether the assistant wrote them."""
    pieces, done = [], ""
    for i, message in enumerate(messages, 1):
        whole = tokenizer.apply_chat_template(messages[:i], tokenize=False)
        if message["role"] == "assistant":
            asked = tokenizer.apply_chat_template(messages[: i - 1], tokenize=False, add_generation_prompt=True)
            pieces += [(asked[len(done) :], False), (whole[len(asked) :], True)]
        else:
            pieces.append((whole[len(done) :], False))
        done = whole
    return pieces


def _join(pieces: Sequence[tuple[str, bool]], tokenizer: Any) -> tuple[list[int], list[int]]:
    tokens: list[int] = []
    labels: list[int] = []
    for text, labelled in pieces:
        ids = tokenizer(text, add_special_tokens=not tokens)["input_ids"]
        tokens += ids
        labels += ids if labelled else [IGNORE] * len(ids)
    return tokens, labels
