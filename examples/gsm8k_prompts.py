"""GSM8K as prompts and answers, with solved problems in front of each; and how many answers of a model are right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

BANK = 200  # the first training problems are the ones that prompts show solved: nothing is trained on them
_CALCULATOR = re.compile(r"<<.*?>>")
_RESULT = re.compile(r"####\s*(-?[\d,.]*\d)")


def write_prompts(source: Path, folder: Path, shots: int, solved: bool = True) -> tuple[Path, Path]:
    """Write ``train.jsonl`` and ``test.jsonl`` of {"prompt", "answer"} into ``folder``; the same ones at every call.

    ``shots``: how many problems a prompt shows before its own, ``solved`` or without their answers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    train, test = (problems(source / name) for name in ("train.jsonl", "test.jsonl"))
    generator = torch.Generator().manual_seed(1234)

    def prompts(chosen: Sequence[tuple[str, str]]) -> Iterator[str]:
        for question, answer in chosen:
            shown = [train[i] for i in torch.randint(BANK, (shots,), generator=generator).tolist()]
            before = "".join(f"Question: {q}\nAnswer: {a}\n\n" if solved else f"Question: {q}\n\n" for q, a in shown)
            yield json.dumps({"prompt": f"{before}Question: {question}", "answer": answer}) + "\n"

    paths = folder / "train.jsonl", folder / "test.jsonl"
    for path, chosen in zip(paths, (train[BANK:], test), strict=True):
        path.write_text("".join(prompts(chosen)), encoding="utf-8")
    return paths


def prompts_in_random_order(path: Path, shots: int, seed: int) -> Iterator[tuple[str, str]]:
    """Prompts, ``shots`` solved problems and then one, and its answers: of all but the first ``BANK`` problems."""
    every = problems(path)
    generator = torch.Generator().manual_seed(seed)
    for number in (torch.randperm(len(every) - BANK, generator=generator) + BANK).tolist():
        shown = [every[i] for i in torch.randint(BANK, (shots,), generator=generator).tolist()]
        before = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in shown)
        question, answer = every[number]
        yield f"{before}Question: {question}\nAnswer:", answer


def problems(path: Path) -> list[tuple[str, str]]:
    """Questions and worked answers, without the marks that are meant for a calculator."""
    with path.open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return [(record["question"], _CALCULATOR.sub("", record["answer"])) for record in records]


def result(answer: str) -> str | None:
    """The number behind ``####``, in one way of writing it; None without one."""
    found = _RESULT.findall(answer)
    return found[-1].replace(",", "").removesuffix(".0") if found else None


@torch.no_grad()
def right_answers(
    model: Any,
    tokenizer: Any,
    path: Path,
    count: int,
    *,
    batch: int = 64,
    new_tokens: int = 256,
    progress: Callable[[int, int], None] = lambda done, right: None,
) -> float:
    """The share of the first ``count`` problems of ``path`` whose greedy answer ends in the right number.

    ``progress`` gets how many are answered, and how many of them are right.
    """
    with path.open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file][:count]
    tokenizer.padding_side = "left"  # answers begin behind the prompts, at one position
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model.eval()
    right = 0
    for first in range(0, len(records), batch):
        some = records[first : first + batch]
        chats = [[{"role": "user", "content": record["prompt"]}] for record in some]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        written = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
        answers = tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for answer, record in zip(answers, some, strict=True):
            right += result(answer) == result(record["answer"])
        progress(first + len(some), right)
    return right / len(records)
