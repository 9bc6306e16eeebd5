"""One process of a data-parallel Trainer, for ``torchrun``: writes what it saw to ``FOLDER/RANK.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from trainers import OPTIONS, Collator, Tokens, plain
from transformers import Trainer, TrainingArguments

import cggr_compile
from cggr_compile.integrations.transformers import CGGRCallback


def main(folder: Path) -> None:
    # buckets of 4 to 10 kB: many, as a real model has
    torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 4096
    settings = dict(use_cpu=True, ddp_backend="gloo", ddp_bucket_cap_mb=0.01, report_to=[], disable_tqdm=True)
    settings |= dict(max_steps=2, per_device_train_batch_size=2, logging_steps=1, save_strategy="steps", save_steps=1)
    args = TrainingArguments(str(folder), optim="sgd", learning_rate=0.05, **settings)
    # the same batch everywhere: positions differ by the seeds alone
    trainer = Trainer(plain(), args, Collator(), Tokens(), callbacks=[CGGRCallback(**{**OPTIONS, "scoring": "random"})])
    with torch.random.fork_rng():
        trainer.train()
    runtime = cggr_compile.runtime(trainer.model)
    batch = next(iter(torch.utils.data.DataLoader(Tokens(), 2, collate_fn=Collator())))
    trainer.model(**batch)
    found = {
        "wrapped": type(trainer.model_wrapped).__name__,
        "metrics": runtime.metrics(),
        "selected": runtime.selected.tolist(),
        "weight": trainer.model.lm_head.weight.detach().sum().item(),
        "seed": runtime.seed,
    }
    (folder / f"{args.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
