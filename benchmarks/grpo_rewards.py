"""Rewards of GRPO over its steps, stock TRL beside ours: is as much learned from a fifth of the completions' rows?

SmolLM2-135M-Instruct on GSM8K behind ``--shots`` solved problems. A completion is worth 0.2 if it ends its answer with
``#### number``, and 1 more if that is the right number. Both arms train with ``top_entropy_quantile=0.2``; ours with
``CGGRCallback()`` and --options. Every arm and seed runs in a process of its own, side by side on all devices: nothing
is timed.

    python benchmarks/grpo_rewards.py --device cuda --json runs/grpo-rewards.json
    python benchmarks/grpo_rewards.py --tiny                                      # the CPU rehearses
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from arguments import items
from rich.table import Table
from turns import answer, conclude, measure

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples"))
ARMS = ("stock", "ours")
FORMAT, RIGHT = 0.2, 1.0
PARTS = 4  # of the steps: a mean reward for each
TINY = dict(
    steps=4, seeds=1, prompts=1, group=2, new_tokens=16, prompt_length=128, shots=0, options={"compiler": "eager"}
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--arms", type=items(allowed=ARMS), default=list(ARMS))
    add("--model", type=Path, help="folder; default: SmolLM2-135M-Instruct")
    add("--steps", type=int, default=100)
    add("--seeds", type=int, default=2)
    add("--prompts", type=int, default=8, help="of a step")
    add("--group", type=int, default=8, help="completions of a prompt")
    add("--new-tokens", type=int, default=128, help="most tokens of a completion")
    add("--prompt-length", type=int, default=384, help="tokens; prompts are shorter, and padded to it")
    add("--shots", type=int, default=2, help="solved problems in a prompt")
    add("--lr", type=float, default=1e-5)
    add("--options", type=json.loads, default={"launch_bound": "select"}, help="of the callback, as JSON")
    add("--json", type=Path, default=Path("runs/benchmarks/grpo_rewards.json"))
    add("--tiny", action="store_true", help=f"changes the defaults to {TINY}")
    add("--run", nargs=2, help=argparse.SUPPRESS)  # arm and seed, in a process of its own
    if "--tiny" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**TINY)
    args = parser.parse_args(argv)
    for name, least in (("steps", PARTS), ("seeds", 1), ("prompts", 1), ("group", 2), ("new_tokens", 1), ("shots", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    if args.model is None:
        from smollm2 import smollm2

        args.model = smollm2(ROOT / "runs" / "smollm2" / "model")
    return args


# One arm and seed, in its process.


def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """What each completion is worth; a model goes on with another problem: that is cut off."""
    from gsm8k_prompts import result

    numbers = [result(completion.split("\nQuestion:")[0]) for completion in completions]
    return [
        FORMAT * (number is not None) + RIGHT * (number is not None and number == result(wanted))
        for number, wanted in zip(numbers, answer, strict=True)
    ]


def run(arm: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Trains; the mean reward of every step."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    callbacks = []
    if arm == "ours":
        from cggr_compile.integrations.transformers import CGGRCallback

        callbacks = [CGGRCallback(**{"fallback": "error", **args.options})]
    config = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=args.steps,
        per_device_train_batch_size=args.prompts * args.group,
        num_generations=args.group,
        max_completion_length=args.new_tokens,
        pad_to_multiple_of=args.prompt_length,
        learning_rate=args.lr,
        top_entropy_quantile=0.2,
        bf16=args.device == "cuda",
        use_cpu=args.device == "cpu",
        seed=seed,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    problems = Dataset.from_list(_problems(tokenizer, seed, args))
    trainer = trl.GRPOTrainer(
        model, reward, args=config, train_dataset=problems, processing_class=tokenizer, callbacks=callbacks
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "reward" in entry]
    found: dict[str, Any] = {name: [entry[name] for entry in logs] for name in ("reward", "grad_norm")}
    if callbacks:
        import cggr_compile

        found["metrics"] = cggr_compile.runtime(trainer.model).metrics()
    return found


def _problems(tokenizer: Any, seed: int, args: argparse.Namespace) -> list[dict[str, str]]:
    """As many as are trained on, each with prompts of its own."""
    from gsm8k_prompts import prompts_in_random_order

    found = []
    for prompt, solved in prompts_in_random_order(ROOT / "data" / "gsm8k" / "train.jsonl", args.shots, seed):
        if len(tokenizer(prompt).input_ids) <= args.prompt_length:
            found.append({"prompt": prompt, "answer": solved})
        if len(found) == args.steps * args.prompts:
            return found
    raise SystemExit(f"error: {len(found)} prompts fit into --prompt-length {args.prompt_length}")


# All of them.


def table(document: dict[str, Any]) -> Table:
    """The mean reward of each quarter of the steps: mean and standard deviation over the seeds."""
    found = Table(title=document["machine"]["device"])
    found.add_column("arm")
    runs = [record for record in document["results"] if "reward" in record]
    steps = len(runs[0]["reward"]) if runs else 0
    parts = [slice(steps * part // PARTS, steps * (part + 1) // PARTS) for part in range(PARTS)]
    for part in parts:
        found.add_column(f"steps {part.start + 1} to {part.stop}", justify="right")
    for arm in dict.fromkeys(record["arm"] for record in document["results"]):
        cells = []
        for part in parts:
            means = [mean(record["reward"][part]) for record in runs if record["arm"] == arm]
            spread = f" ± {stdev(means):.3f}" if len(means) > 1 else ""
            cells.append(f"{mean(means):.3f}{spread} ({len(means)})" if means else "failed")
        found.add_row(arm, *cells)
    return found


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    if args.run:
        arm, seed = args.run
        return answer(lambda _: run(arm, int(seed), args))
    runs = [{"arm": arm, "seed": seed} for seed in range(args.seeds) for arm in args.arms]
    document = measure(__file__, argv, runs, args, lambda found: "done")
    return conclude(document, table(document))


if __name__ == "__main__":
    sys.exit(main())
