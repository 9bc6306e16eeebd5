"""Reinforcement learning (GRPO) with TRL: the reward of a completion is 1 if it ends in the problem's right number.

``--dense``: without the callback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from gsm8k_prompts import result
from trl import GRPOConfig, GRPOTrainer
from trl_run import gsm8k, load, parse_arguments, run, settings

from cggr_compile.integrations.transformers import CGGRCallback

CUDA = torch.cuda.is_available()
GROUP = 8 if CUDA else 2  # completions of a prompt
NEW_TOKENS = 256 if CUDA else 64  # of a completion


def right_number(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Whether the number behind ``####`` is the answer's; a model goes on with another problem: that is cut off."""
    written = [completion.split("\nQuestion:")[0] for completion in completions]
    return [float(result(text) == result(wanted)) for text, wanted in zip(written, answer, strict=True)]


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(__doc__, argv, "trl_grpo", lr=1e-6)
    if args.batch_size % GROUP:
        sys.exit(f"error: --batch-size must be a multiple of {GROUP}, the completions of a prompt")
    model, tokenizer = load(args)
    pairs = gsm8k(args, tokenizer, args.steps * args.batch_size // GROUP)
    trainer = GRPOTrainer(
        model,
        right_number,
        GRPOConfig(
            **settings(args),
            num_generations=GROUP,
            max_completion_length=NEW_TOKENS,
            pad_to_multiple_of=256,  # prompts and completions: every size is compiled once, a few are enough
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt, "answer": answer} for prompt, answer in pairs]),
        processing_class=tokenizer,
        callbacks=[] if args.dense else [CGGRCallback(**args.options)],  # the one line
    )
    return run(trainer, args)


if __name__ == "__main__":
    sys.exit(main())
