"""Preference training (DPO) with TRL: GSM8K's answers against the same ones with one number changed.

``--dense``: without the callback.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Sequence

from datasets import Dataset
from trl import DPOConfig, DPOTrainer
from trl_run import gsm8k, load, parse_arguments, run, settings

from cggr_compile.integrations.transformers import CGGRCallback


def with_another_number(answer: str, seed: int) -> str:
    """``answer`` with one of its numbers, of one to nine, more."""
    generator = random.Random(seed)
    found = generator.choice(list(re.finditer(r"\d+", answer)))
    return f"{answer[: found.start()]}{int(found[0]) + generator.randint(1, 9)}{answer[found.end() :]}"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(__doc__, argv, "trl_dpo", lr=1e-6)
    model, tokenizer = load(args)
    rows = [
        {"prompt": prompt, "chosen": answer, "rejected": with_another_number(answer, seed)}
        for seed, (prompt, answer) in enumerate(gsm8k(args, tokenizer, args.steps * args.batch_size))
    ]
    trainer = DPOTrainer(
        model,
        # all batches have one size: a single graph is compiled
        args=DPOConfig(**settings(args), max_length=args.length, pad_to_multiple_of=args.length),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[] if args.dense else [CGGRCallback(**args.options)],  # the one line
    )
    return run(trainer, args)


if __name__ == "__main__":
    sys.exit(main())
