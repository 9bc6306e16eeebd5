"""Supervised fine-tuning with TRL: answers to GSM8K's problems, behind solved ones.

``--dense``: without the callback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl_run import gsm8k, load, parse_arguments, run, settings

from cggr_compile.integrations.transformers import CGGRCallback


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(__doc__, argv, "trl_sft", lr=2e-5)
    model, tokenizer = load(args)
    pairs = gsm8k(args, tokenizer, args.steps * args.batch_size)
    trainer = SFTTrainer(
        model,
        # all batches have one size: a single graph is compiled
        SFTConfig(**settings(args), max_length=args.length, pad_to_multiple_of=args.length),
        train_dataset=Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in pairs]),
        processing_class=tokenizer,
        callbacks=[] if args.dense else [CGGRCallback(**args.options)],  # the one line
    )
    return run(trainer, args)


if __name__ == "__main__":
    sys.exit(main())
