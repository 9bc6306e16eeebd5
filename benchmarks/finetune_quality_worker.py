"""One arm of finetune_quality.py in a process of its own: compiles its step once, then trains as often as it is told.

Requests are JSON objects, one a line, on standard input; every one is answered by one JSON object on standard output:

    {"do": "train", "lr": 2e-4, "seed": 0, "steps": 300}   -> loss: held-out loss at the end; metrics of the last step
    {"do": "time", "steps": 5}                             -> seconds: of a training step, the optimizer included
    {"do": "accuracy", "count": 1319}                      -> share of right greedy answers of the model as it is now

The model is bfloat16 with float32 masters in the optimizer, as in quality_run.py; adapters are float32, and then the
step is under autocast. On a CPU everything is float32.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
import torch.nn.functional as F
from arms import Step, build_baseline, build_selective
from finetune_arms import under_autocast
from quality_run import Masters, batches
from quality_text import IGNORE, Blocks
from transformers import AutoModelForCausalLM, AutoTokenizer

import cggr_compile

sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))
from finetune import share_of_rate
from gsm8k_prompts import right_answers

LR_WARMUP = 0.05  # share of the steps
EVAL_SEQUENCES = 16  # at a time
ANSWERS = 256  # prompts that are answered at a time
TIMED_PARTS = 7


def options_of(arm: str, context: str) -> dict[str, Any]:
    """The backend's options of an arm: ``context-N``, ``context-N-stop``, ``exact`` or ``random``."""
    if arm == "exact":
        return {"gradient": "exact"}
    if arm == "random":  # control: half of the labels, drawn at random, with the default's context
        return {"selection": "random", "scoring": "random", "context": 128, "min_tokens_ratio": float(context)}
    _, reach, *stop = arm.split("-")
    return {"context": int(reach)} | ({"kv_gradient": "stop"} if stop else {})


def learning_rate(peak: float, step: int, steps: int) -> float:
    """That of examples/finetune.py."""
    return peak * share_of_rate(step, steps, max(1, round(LR_WARMUP * steps)))


def add_adapters(model: Any, rank: int) -> Any:
    """Freezes the model and gives every linear layer but the head a float32 adapter, alpha twice the rank, in place."""
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    return peft.get_peft_model(model, config).get_base_model()


class Worker:
    """A model, its compiled step, and the data it trains on."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.device, self.sequences = settings["device"], settings["batch"]
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=dtype).to(self.device).train()
        self.model.config.use_cache = False
        if settings["lora"] is not None:
            self.model = add_adapters(self.model, settings["lora"])
        self.settings = settings
        data = torch.load(settings["data"])
        self.train_blocks, self.held_out = (Blocks(*data[name]).to(self.device) for name in ("train", "test"))
        self.start = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
        self.selective = settings["arm"] != "dense"
        self.step = self._build()
        begin = time.perf_counter()
        for _ in range(3):  # compiles, warms up and records CUDA graphs
            self._begin(seed=0)
            self._train_step(1e-5)
        self._wait()
        self.compile_s = time.perf_counter() - begin

    def _build(self) -> Step:
        settings = self.settings
        how = {"compiler": settings["compiler"], "cuda_graphs": settings["cuda_graphs"]}
        if self.selective:
            step = build_selective(self.model, {**how, **options_of(settings["arm"], settings["half_of_labels"])})
        else:
            step = build_baseline("fair", self.model, **how)
        return under_autocast(step, self.device) if self._mixed else step

    @property
    def _mixed(self) -> bool:
        """Whether the model is bfloat16 with float32 adapters."""
        return self.device == "cuda" and self.settings["lora"] is not None

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _begin(self, seed: int) -> None:
        self.optimizer = Masters(self.model, self.start, weight_decay=0.01)
        self.batches = batches(self.train_blocks, self.sequences, seed)

    def _train_step(self, lr: float) -> None:
        ids, labels = next(self.batches)
        if self.device == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        self.step(ids, labels).backward()
        self.optimizer.step(lr)

    def train(self, lr: float, seed: int, steps: int) -> dict[str, Any]:
        """From the pretrained weights; same seed, same order of sequences for every arm and batch size."""
        self._begin(seed)
        for step in range(steps):
            self._train_step(learning_rate(lr, step, steps))
        found: dict[str, Any] = {"loss": self.held_out_loss(), "metrics": None}
        if self.selective:
            found["metrics"] = cggr_compile.runtime(self.model).metrics()
        return found

    def time(self, steps: int) -> dict[str, Any]:
        """Seconds of a step of the training loop, the device to itself; the weights are changed a little.

        The median over parts: slots that grow compile a step anew in one of them.
        """
        per_step = []
        for _ in range(TIMED_PARTS):
            self._wait()
            begin = time.perf_counter()
            for _ in range(steps):
                self._train_step(1e-6)
            self._wait()
            per_step.append((time.perf_counter() - begin) / steps)
        return {"seconds": median(per_step)}

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean over the held-out labels, of the uncompiled model; logits of labelled positions only."""
        self.model.eval()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        parts = (blocks.split(EVAL_SEQUENCES) for blocks in (self.held_out.ids, self.held_out.labels))
        for ids, labels in zip(*parts, strict=True):
            target = labels[:, 1:].long()
            with torch.autocast(self.device, torch.bfloat16, enabled=self._mixed):
                hidden = self.model.model(input_ids=ids.long()).last_hidden_state[:, :-1][target != IGNORE]
                logits = self.model.lm_head(hidden).float()
            total += F.cross_entropy(logits, target[target != IGNORE], reduction="sum")
        self.model.train()
        return float(total / (self.held_out.labels[:, 1:] != IGNORE).sum())

    def accuracy(self, count: int) -> dict[str, Any]:
        """Greedy answers of the weights as they are."""
        tokenizer = AutoTokenizer.from_pretrained(self.settings["model"])
        share = right_answers(self.model, tokenizer, Path(self.settings["prompts"]), count, batch=ANSWERS)
        self.model.train()
        return {"accuracy": share, "count": count}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=json.loads, help="what finetune_quality.py tells its workers")
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever prints must not be taken for an answer
    worker = Worker(parser.parse_args().settings)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    say({"compile_s": worker.compile_s})
    actions: dict[str, Any] = {"train": worker.train, "time": worker.time, "accuracy": worker.accuracy}
    for line in sys.stdin:
        request = json.loads(line)
        say(actions[request.pop("do")](**request))
    return 0


if __name__ == "__main__":
    sys.exit(main())
