"""The demo's task: the solution of the last of several GSM8K problems; and the text of problems, to learn before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from chat_data import IGNORE, Example, collate, encode, read_chats
from gsm8k_data import END, pack, train_tokenizer
from gsm8k_prompts import problems, write_prompts
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

_AT_ONCE = 500  # chats that become tokens in one go


@dataclass(frozen=True)
class Task:
    """What the demo trains on.

    Attributes:
        blocks: the text of all training problems, without solutions, int64 [blocks, length].
        train: problems and the solution of the last one, which alone has labels.
        held_out: the same of test problems.
        padding: token behind the end of a sequence.
    """

    blocks: Tensor
    train: list[Example]
    held_out: list[Example]
    padding: int

    @property
    def held_out_labels(self) -> int:
        return sum(example.predicted for example in self.held_out)


def read_task(
    data: Path, out: Path, *, vocab: int, length: int, others: int, most_labels: int, train: int, held_out: int
) -> Task:
    """Train a tokenizer of ``vocab`` tokens on the text and write all as tokens; the same at every call.

    Args:
        data: folder of train.jsonl and test.jsonl. out: folder for the prompts and the tokenizer.
        length: tokens of a sequence; a longer prompt loses its beginning.
        others: problems in front of the one to solve, without solutions.
        most_labels: problems with more answer tokens than that are left out.
        train: how many prompts to train on. held_out: how many to evaluate on.
    """
    known = problems(data / "train.jsonl")
    fast = train_tokenizer([f"{question}\n{answer}" for question, answer in known], vocab)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=END)
    tokenizer.save_pretrained(out / "tokenizer")
    files = write_prompts(data, out / "prompts", others, solved=False)
    prompts, test_prompts = (
        list(islice(_short(file, tokenizer, length, most_labels), count))
        for file, count in zip(files, (train, held_out), strict=True)
    )
    blocks = pack([f"Question: {question}\n\n" for question, _ in known], fast, length)
    return Task(blocks, prompts, test_prompts, padding=tokenizer.eos_token_id)


def _short(file: Path, tokenizer: PreTrainedTokenizerFast, length: int, most_labels: int) -> Iterator[Example]:
    chats = read_chats(file)
    for first in range(0, len(chats), _AT_ONCE):
        for example in encode(chats[first : first + _AT_ONCE], tokenizer, length):
            if example.predicted <= most_labels:
                yield example


def all_labelled(example: Example) -> Example:
    """The same sequence with a loss on the prompt too."""
    return replace(example, labels=example.ids)


@torch.no_grad()
def answer_losses(model: LlamaForCausalLM, examples: Sequence[Example], batch: int, padding: int) -> list[float]:
    """The loss of each sequence's labels, summed: by the dense model, not compiled, in evaluation mode."""
    model.eval()
    sums = []
    for first in range(0, len(examples), batch):
        some = examples[first : first + batch]
        ids, labels = collate(some, max(len(example.ids) for example in some), padding)
        hidden, targets = model.model(input_ids=ids).last_hidden_state[:, :-1], labels[:, 1:]
        # logits of the answers only
        losses = torch.zeros(targets.shape)
        has = targets != IGNORE
        losses[has] = cross_entropy(model.lm_head(hidden[has]), targets[has], reduction="none")
        sums += losses.sum(1).tolist()
    model.train()
    return sums
