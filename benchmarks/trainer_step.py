"""Times the update of TRL's trainers (forward, backward, optimizer; generation apart): stock, stock compiled, ours.

Methods: ``sft`` (answers behind ``--shots`` solved problems of GSM8K), ``dpo`` (such answers, and the same with one
number changed), ``grpo`` (a reward for the right number, ``top_entropy_quantile=0.2``). The model is a folder, by
default SmolLM2-135M-Instruct (examples/smollm2.py), or random weights of a ``--shape``'s model with that tokenizer.

Arms: ``stock`` is TRL as users run it (its fused head, bfloat16, gradient checkpointing), ``compiled`` the same with
``torch_compile=True``, ``compiled-graphs`` that with CUDA graphs, ``ours`` with ``CGGRCallback()``, and ``ours-kept``
that without gradient checkpointing, which keeps what checkpoints would compute again. Every arm trains in a process of
its own. All run their first steps at once, which compile (ours may compile again where later batches have more labels
than the first); then each has the device to itself for its last ``--measured`` steps.

A step is measured on the device's clock, from the batch's arrival to the optimizer's end; figures are medians of the
measured steps. Peak memory is over what is allocated before the first step.

    python benchmarks/trainer_step.py --device cuda --methods sft,dpo,grpo --json runs/trainers.json
    python benchmarks/trainer_step.py --device cuda --methods sft --shape 8b --lora 16
    python benchmarks/trainer_step.py --tiny                                           # the CPU rehearses
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from arguments import items
from rich.table import Table
from shapes import MODELS
from turns import answer, conclude, measure, wait_for_turn

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples"))
METHODS = ("sft", "dpo", "grpo")
ARMS = ("stock", "compiled", "compiled-graphs", "ours", "ours-kept")
# sequences of a batch and most tokens of one
BATCHES = {"sft": (8, 2048), "dpo": (4, 1024), "grpo": (8, 768)}
PADS = {"sft": 2048, "dpo": 512, "grpo": 256}  # sizes of batches are multiples of it: one size is compiled
COMPLETION, GROUP, SHOTS = 256, 8, 2  # of grpo
TINY = dict(
    methods=["sft"], arms=["stock", "ours"], shots=0, steps=4, measured=2, shape="tiny", batch=2, length=256, pad=256
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--methods", type=items(allowed=METHODS), default=list(METHODS))
    add("--arms", type=items(allowed=ARMS), default=list(ARMS))
    add("--model", type=Path, help="folder; default: SmolLM2-135M-Instruct")
    add("--shape", choices=MODELS, help="random weights of this model in place of the folder's")
    add("--lora", type=int, help="rank of adapters; the model is frozen then")
    add("--shots", type=int, default=8, help="solved problems in a prompt of sft")
    add("--batch", type=int, help=f"sequences; default: {BATCHES}")
    add("--length", type=int, help="most tokens of a sequence; default: as above")
    add("--pad", type=int, help=f"sizes of batches are multiples of it: few are compiled; default: {PADS}")
    add("--steps", type=int, default=48)
    add("--measured", type=int, default=8, help="of the steps, the last ones")
    add("--at-once", type=int, help="arms that compile, and hold the device's memory, at the same time; default: all")
    add("--within", type=float, help="seconds for an arm's first steps, which compile: one that takes longer is ended")
    add("--options", type=json.loads, default={}, help="of the callback, as JSON")
    add("--json", type=Path, default=Path("runs/benchmarks/trainer_step.json"))
    add("--tiny", action="store_true", help=f"changes the defaults to {TINY}")
    add("--run", nargs=2, help=argparse.SUPPRESS)  # method and arm, in a process of its own
    if "--tiny" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**TINY)
    args = parser.parse_args(argv)
    if not 1 <= args.measured < args.steps:
        parser.error("--measured must be at least 1 and less than --steps: the first ones compile")
    if args.at_once is not None and args.at_once < 1:
        parser.error("--at-once must be at least 1")
    if args.lora is not None and args.lora < 1:
        parser.error("--lora must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    if args.model is None:
        from smollm2 import smollm2

        args.model = smollm2(ROOT / "runs" / "smollm2" / "model")
    return args


# One arm, in its process.


def run(method: str, arm: str, args: argparse.Namespace, prepared: Callable[[], None]) -> dict[str, Any]:
    """Trains ``args.steps`` steps; what was measured. ``prepared`` is called before the measured ones."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    trainer = _trainer(method, arm, args, tokenizer)
    clock = _clock(args.device, args.measured, prepared)
    trainer.add_callback(clock)
    _count_apart(trainer, clock)
    trainer.train()
    found: dict[str, Any] = clock.summary()
    found["loss"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
    if arm.startswith("ours"):
        import cggr_compile

        found["metrics"] = cggr_compile.runtime(trainer.model).metrics()
    return found


def _trainer(method: str, arm: str, args: argparse.Namespace, tokenizer: Any) -> Any:
    import trl

    batch, length = BATCHES[method]
    batch, length, pad = args.batch or batch, args.length or length, args.pad or PADS[method]
    common = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": args.steps,
        "per_device_train_batch_size": batch,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": args.device == "cpu",
        "bf16": args.device == "cuda",
        "torch_compile": arm.startswith("compiled"),
        "torch_compile_mode": "reduce-overhead" if arm == "compiled-graphs" else None,
    }
    if arm == "ours-kept":
        common["gradient_checkpointing"] = False
    rest = {"processing_class": tokenizer, "callbacks": _callbacks(arm, args), "peft_config": _adapters(args)}
    model, count = _model(args), args.steps * batch
    if method == "sft":
        config = trl.SFTConfig(**common, max_length=length, pad_to_multiple_of=pad)
        return trl.SFTTrainer(model, config, train_dataset=_problems(args.shots, count), **rest)
    if method == "dpo":
        config = trl.DPOConfig(**common, max_length=length, pad_to_multiple_of=pad)
        reference = None if args.lora is not None else _model(args)
        return trl.DPOTrainer(model, reference, args=config, train_dataset=_preferences(count), **rest)
    common["pad_to_multiple_of"] = pad
    group = {"num_generations": min(GROUP, batch), "max_completion_length": min(COMPLETION, length // 2)}
    config = trl.GRPOConfig(**common, **group, num_iterations=args.steps, top_entropy_quantile=0.2, beta=0.0)
    return trl.GRPOTrainer(
        model, _reward, args=config, train_dataset=_problems(min(SHOTS, args.shots), count, grpo=True), **rest
    )


def _model(args: argparse.Namespace) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    dtype = torch.bfloat16 if args.lora is not None and args.device == "cuda" else torch.float32
    if args.shape is None:
        return AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    sizes = {**MODELS[args.shape], "vocab_size": max(MODELS[args.shape]["vocab_size"], 49152)}  # the tokenizer's
    torch.manual_seed(0)
    with torch.device(args.device):
        return LlamaForCausalLM(LlamaConfig(**sizes)).to(dtype)


def _adapters(args: argparse.Namespace) -> Any:
    if args.lora is None:
        return None
    import peft

    return peft.LoraConfig(r=args.lora, target_modules="all-linear", task_type="CAUSAL_LM")


def _callbacks(arm: str, args: argparse.Namespace) -> list[Any]:
    if not arm.startswith("ours"):
        return []
    from cggr_compile.integrations.transformers import CGGRCallback

    return [CGGRCallback(**{"fallback": "error", **args.options})]


def _records(shots: int, count: int) -> list[dict[str, str]]:
    from gsm8k_prompts import write_prompts

    train, _ = write_prompts(ROOT / "data" / "gsm8k", Path(tempfile.mkdtemp()), shots)
    return [json.loads(line) for line in train.read_text(encoding="utf-8").splitlines()[:count]]


def _turn(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def _problems(shots: int, count: int, *, grpo: bool = False) -> Any:
    from datasets import Dataset

    names = "answer" if grpo else "completion"
    rows = [
        {
            "prompt": _turn("user", record["prompt"]),
            names: record["answer"] if grpo else _turn("assistant", record["answer"]),
        }
        for record in _records(shots, count)
    ]
    return Dataset.from_list(rows)


def _preferences(count: int) -> Any:
    """The answer, and the answer with its last number changed."""
    from datasets import Dataset
    from gsm8k_prompts import result

    rows = []
    for record in _records(0, count):
        right = record["answer"]
        number = result(right)
        if number is None:
            continue
        head, _, tail = right.rpartition(number)
        other = str(int(float(number)) + 7)
        chosen, rejected = _turn("assistant", right), _turn("assistant", f"{head}{other}{tail}")
        rows.append({"prompt": _turn("user", record["prompt"]), "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(rows)


def _reward(completions: list[Any], answer: list[str], **_rest: Any) -> list[float]:
    from gsm8k_prompts import result

    written = [completion[0]["content"] for completion in completions]
    return [float(result(text) == result(right)) for text, right in zip(written, answer, strict=True)]


def _clock(device: str, measured: int, prepared: Callable[[], None]) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Seconds of every step, and of what is not the update in it."""

        def __init__(self) -> None:
            self.steps: list[float] = []
            self.apart = 0.0
            self.static = 0

        def now(self) -> float:
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter()

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if device == "cuda" and not self.steps:
                self.static = torch.cuda.memory_allocated()
            if len(self.steps) == state.max_steps - measured:
                self.now()
                prepared()
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
            self.begin, self.apart = self.now(), 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.steps.append(self.now() - self.begin - self.apart)

        def summary(self) -> dict[str, Any]:
            last = self.steps[-measured:]
            peak = (torch.cuda.max_memory_allocated() - self.static) / 2**20 if device == "cuda" else None
            return {"step_ms": 1e3 * median(last), "first_s": sum(self.steps[:2]), "peak_mb": peak, "steps": self.steps}

    return Clock()


def _count_apart(trainer: Any, clock: Any) -> None:
    """What prepares a batch (generation, the reference's forward) is no part of the update."""
    prepare: Callable[..., Any] = trainer._prepare_inputs

    def timed(*inputs: Any, **kwargs: Any) -> Any:
        begin = clock.now()
        found = prepare(*inputs, **kwargs)
        clock.apart += clock.now() - begin
        return found

    trainer._prepare_inputs = timed


# All of them.


def table(document: dict[str, Any]) -> Table:
    found = Table(title=document["machine"]["device"])
    for name in ("method", "arm", "update ms", "× stock", "peak MB", "memory ×", "loss", "level"):
        found.add_column(name, justify="left" if name in ("method", "arm") else "right")
    stock = {r["method"]: r for r in document["results"] if r["arm"] == "stock" and "step_ms" in r}
    for record in document["results"]:
        if "step_ms" not in record:
            found.add_row(record["method"], record["arm"], "failed")
            continue
        base, peak = stock.get(record["method"]), record["peak_mb"]
        times = f"{base['step_ms'] / record['step_ms']:.2f}" if base else "–"
        memory = f"{base['peak_mb'] / peak:.2f}" if base and peak else "–"
        level = record.get("metrics", {}).get("level", "–")
        found.add_row(
            *(record["method"], record["arm"], f"{record['step_ms']:.1f}", times),
            *(f"{peak:.0f}" if peak else "–", memory, f"{record['loss']:.4f}", level),
        )
    return found


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    if args.run:
        method, arm = args.run
        return answer(lambda answers: run(method, arm, args, lambda: wait_for_turn(answers)))
    runs = [{"method": method, "arm": arm} for method in args.methods for arm in args.arms]
    document = measure(__file__, argv, runs, args, lambda found: f"{found['step_ms']:.0f} ms")
    return conclude(document, table(document))


if __name__ == "__main__":
    sys.exit(main())
