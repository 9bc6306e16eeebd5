"""Text to token blocks: read JSON lines, train a BPE tokenizer on them, pack everything into blocks of one length."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|end|>"


def read_texts(path: Path) -> list[str]:
    """One text per line of ``path``: its "text", or its "question" and "answer"."""
    texts = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        texts.append(record["text"] if "text" in record else f"{record['question']}\n{record['answer']}")
    return texts


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pack(texts: list[str], tokenizer: Tokenizer, length: int) -> torch.Tensor:
    """All texts, joined by the end token, as [blocks, length]; the incomplete last block is dropped."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch([text + END for text in texts]):
        ids += encoding.ids
    blocks = len(ids) // length
    if blocks == 0:
        raise ValueError(f"{len(ids)} tokens do not fill one block of {length}")
    return torch.tensor(ids[: blocks * length]).view(blocks, length)
