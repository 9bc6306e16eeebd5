"""Chats in a JSONL file, as token sequences in which only the assistant's words have a label.

A line is ``{"prompt": "...", "answer": "..."}`` or ``{"messages": [{"role": "user", "content": "..."}, ...]}`` with
roles system, user, assistant and tool. Any other keys are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor

IGNORE = -100
ROLES = ("system", "user", "assistant", "tool")
# of a tokenizer that has none: it is stored with the tokenizer, so that whoever loads the model writes prompts alike
PLAIN_TEMPLATE = (
    "{{ start_token }}{% for message in messages %}{{ '### ' + message['role'] + '\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
)
_AT_ONCE = 256  # texts that the tokenizer gets in one call

Message = dict[str, str]


@dataclass(frozen=True)
class Chat:
    """Messages, the last of which is the assistant's, and where they were read: "file:line"."""

    messages: list[Message]
    where: str


@dataclass(frozen=True)
class Example:
    """One token sequence: ids and labels, int32 [tokens] each; a label is the token itself, or -100 (no loss)."""

    ids: Tensor
    labels: Tensor
    cut: bool  # whether the limit on the length took something away

    @property
    def predicted(self) -> int:
        """How many of its tokens count in the loss; the first has nothing in front that could predict it."""
        return int((self.labels[1:] != IGNORE).sum())


def read_chats(path: Path) -> list[Chat]:
    """The chats of a JSONL file; empty lines are skipped, and so is what follows the assistant's last message.

    Raises:
        ValueError: names file and line, and says what is wrong with it.
    """
    chats = []
    with path.open("rb") as file:  # a text file's lines would end at the separators of Unicode, too
        for number, line in enumerate(file, start=1):
            if line.strip():
                where = f"{path}:{number}"
                chats.append(Chat(_messages(line, where), where))
    if not chats:
        raise ValueError(f"{path}: there is no chat in it")
    return chats


def _messages(line: bytes, where: str) -> list[Message]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{where}: this is no JSON in UTF-8: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a line must be a JSON object, this one is of type {type(record).__name__}")
    if "messages" in record:
        messages = record["messages"]
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"{where}: 'messages' must be a list of at least one message")
    elif "prompt" in record and "answer" in record:
        messages = [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["answer"]},
        ]
    else:
        raise ValueError(f"{where}: needs the keys 'prompt' and 'answer', or 'messages'; it has {sorted(record)}")
    found = [_message(message, where) for message in messages]
    while found and found[-1]["role"] != "assistant":
        found.pop()
    if not found:
        raise ValueError(f"{where}: no message of the assistant: there is nothing to learn")
    return found


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise ValueError(f"{where}: a message must be an object with 'role' and 'content', got {message!r:.80}")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise ValueError(f"{where}: the role of a message must be one of {list(ROLES)}, got {role!r}")
    if not isinstance(content, str):
        raise ValueError(f"{where}: the {role}'s message must be a string, got {type(content).__name__}")
    if role == "assistant" and not content.strip():
        raise ValueError(f"{where}: the assistant's message is empty: there is nothing to learn")
    return {"role": role, "content": content}


def encode(chats: Sequence[Chat], tokenizer: Any, limit: int) -> list[Example]:
    """Chats as token sequences of at most ``limit`` tokens, written by the tokenizer's chat template.

    Every assistant's message and its end of turn have labels, nothing else has; a sequence ends with the last label.
    One that is too long loses the beginning of its first prompt, and where that is not enough its end. A tokenizer
    without a template is given a plain one. A template that writes former answers differently once others follow
    (without the reasoning, say) makes one sequence of each answer of a chat.

    Raises:
        ValueError: if the tokenizer cannot tell which characters its tokens stand for, or the template refuses a chat.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("the tokenizer must be a fast one: others do not say which characters a token stands for")
    if tokenizer.chat_template is None:
        tokenizer.chat_template = PLAIN_TEMPLATE.replace("start_token", repr(_start(tokenizer)))
    texts = [text for chat in chats for text in _written(chat, tokenizer)]
    examples = []
    for first in range(0, len(texts), _AT_ONCE):
        some = texts[first : first + _AT_ONCE]
        encoded = tokenizer([text for text, _ in some], add_special_tokens=False, return_offsets_mapping=True)
        for (_, spans), ids, offsets in zip(some, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            examples.append(_example(ids, offsets, spans, limit))
    return examples


def _start(tokenizer: Any) -> str:
    """What the tokenizer puts in front of a text by itself: its first token, or nothing."""
    ids = tokenizer("a").input_ids
    return str(tokenizer.bos_token) if tokenizer.bos_token_id in ids[:1] else ""


Spans = list[tuple[int, int]]


def _written(chat: Chat, tokenizer: Any) -> Iterator[tuple[str, Spans]]:
    """The chat's text, and where the assistant's words are in it (characters, from and up to)."""

    def write(count: int, prompt: bool = False) -> str:
        try:
            return str(
                tokenizer.apply_chat_template(chat.messages[:count], tokenize=False, add_generation_prompt=prompt)
            )
        except TemplateError as error:
            raise ValueError(f"{chat.where}: the tokenizer's chat template refuses this chat: {error}") from None

    answers = [number for number, message in enumerate(chat.messages) if message["role"] == "assistant"]
    turns = [(write(number, prompt=True), write(number + 1)) for number in answers]
    whole = turns[-1][1]
    for before, text in turns:
        if not text.startswith(before):
            raise ValueError(
                f"{chat.where}: the tokenizer's chat template begins an answer in another way than it asks for one: "
                "where it begins cannot be told"
            )
    # white space after the end of turn is the template's
    spans = [(len(before), len(text.rstrip())) for before, text in turns]
    if all(whole.startswith(text) for _, text in turns):
        yield whole, spans
    else:
        for (_, text), span in zip(turns, spans, strict=True):
            yield text, [span]


def _example(ids: list[int], offsets: list[tuple[int, int]], spans: Spans, limit: int) -> Example:
    tokens = torch.tensor(ids, dtype=torch.int32)
    begins, ends = torch.tensor(offsets).view(-1, 2).unbind(1)
    answer = torch.zeros(len(ids), dtype=torch.bool)
    for first, last in spans:
        answer |= begins.clamp(min=first) < ends.clamp(max=last)
    labels = torch.where(answer, tokens, IGNORE)
    where = answer.nonzero().flatten().tolist()
    end = where[-1] + 1  # nothing is learned from what follows
    # one token stays in front of the first label, to predict it
    from_left = min(max(0, end - limit), max(0, where[0] - 1))
    kept = slice(from_left, min(end, from_left + limit))
    return Example(tokens[kept], labels[kept], cut=end > limit)


def common_length(examples: Sequence[Example], limit: int, multiple: int = 64) -> int:
    """One length for all batches: the longest sequence's, rounded up to a multiple, or to the limit."""
    longest = max(len(example.ids) for example in examples)
    return min(limit, -(-longest // multiple) * multiple)


def collate(examples: Sequence[Example], length: int, padding: int) -> tuple[Tensor, Tensor]:
    """(ids, labels), int64 [B, length] each, padded on the right with the token ``padding`` and without labels.

    A causal model needs no attention mask for that: no token looks at the padding behind it.
    """
    ids = torch.full((len(examples), length), padding)
    labels = torch.full((len(examples), length), IGNORE)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        labels[row, : len(example.ids)] = example.labels
    return ids, labels


def describe(examples: Sequence[Example], length: int) -> str:
    """What the sequences are, in words; ``length``: to what they are padded."""
    tokens = sum(len(example.ids) for example in examples)
    share = sum(example.predicted for example in examples) / tokens
    cut = sum(example.cut for example in examples)
    text = f"{len(examples)} sequences, {tokens / len(examples):.0f} tokens on average, padded to {length}; "
    text += f"{share:.1%} of the tokens are the assistant's"
    return text + (f"; {cut} sequences were too long and lost the beginning of their prompt" if cut else "")
