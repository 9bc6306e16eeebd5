"""A tokenizer made here, small data sets of words, and models for them: what the tests of TRL's trainers share."""

from __future__ import annotations

import random
from typing import Any

import models
from datasets import Dataset
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(models.VOCAB - 4)]
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<a> {% generation %}{{ m['content'] }} </s>"
    "{% endgeneration %}{% else %}<u> {{ m['content'] }} {% endif %}{% endfor %}"
)


def tokenizer() -> Any:
    special = ["<pad>", "</s>", "<u>", "<a>"]
    table = {word: i for i, word in enumerate([*special, *WORDS])}
    inner = Tokenizer(tokenizer_models.WordLevel(table, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", additional_special_tokens=["<u>", "<a>"]
    )
    made.chat_template = CHAT
    return made


def words(count: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def texts(size: int = 8, length: int = 15) -> Dataset:
    return Dataset.from_list([{"text": words(length, i)} for i in range(size)])


def completions(size: int = 8, prompt: int = 11, answer: int = 4) -> Dataset:
    """Prompts with an answer, and its end."""
    rows = [{"prompt": words(prompt, i), "completion": " " + words(answer, 100 + i)} for i in range(size)]
    return Dataset.from_list(rows)


def chats(size: int = 8) -> Dataset:
    def turn(role: str, count: int, seed: int) -> dict[str, str]:
        return {"role": role, "content": words(count, seed)}

    rows = [{"messages": [turn("user", 9, i), turn("assistant", 4, 50 + i)]} for i in range(size)]
    return Dataset.from_list(rows)


def preferences(size: int = 8, prompt: int = 10, answer: int = 4) -> Dataset:
    rows = [
        {"prompt": words(prompt, i), "chosen": " " + words(answer, 100 + i), "rejected": " " + words(answer, 200 + i)}
        for i in range(size)
    ]
    return Dataset.from_list(rows)


def model(**overrides: Any) -> Any:
    """A Llama of one layer for this tokenizer."""
    return models.family("llama", **{"num_hidden_layers": 1, "pad_token_id": 0, "eos_token_id": 1, **overrides})
