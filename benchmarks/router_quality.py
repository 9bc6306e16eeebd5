"""What routers know of a pretrained model's tokens while it trains, and what it learns with them at equal steps.

SmolLM2-135M-Instruct goes on training on packed GSM8K, every token labelled. At the steps of ``--marks`` the runtime
says how well its scores are correlated with the tokens' gradients (``scoring="learned"``), and how unequal those are
(``concentration``: a quarter of the tokens, well chosen, can beat half of the batch where it is below a half).
In the end: the loss on held-out problems, of the uncompiled model, and the time of a step, optimizer included.

Every arm runs in a process of its own; all compile at once, then each has the device to itself.

    python benchmarks/router_quality.py --device cuda --json runs/router_quality.json
    python benchmarks/router_quality.py --tiny                                         # the CPU rehearses
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from arguments import items
from arms import build_baseline, build_selective
from quality_run import Masters, batches, held_out_loss
from quality_text import Blocks
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from turns import answer, conclude, measure, wait_for_turn

import cggr_compile

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "examples"))
from finetune import share_of_rate  # noqa: E402
from gsm8k_prompts import problems  # noqa: E402

LEARNED = {"scoring": "learned", "selection": "importance"}
# options of the backend; None: the dense model, with this share of the batch
ARMS: dict[str, dict[str, Any] | float] = {
    "dense": 1.0,
    "half": 0.5,
    "random": {"scoring": "random", "selection": "random"},
    "importance": {"selection": "importance"},
    "learned": LEARNED,
    "learned-1": {**LEARNED, "router_layers": 1},
    "spans": {"scoring": "random", "selection": "spans"},
    "spans-learned": {"scoring": "learned", "selection": "spans"},
}
DEFAULT_ARMS = ["dense", "half", "random", "importance", "learned", "spans", "spans-learned"]
TINY = dict(arms=["half", "learned", "spans"], batch=2, length=64, marks=[1, 2], held_out=2, compiler="eager")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--cuda-graphs", action="store_true")
    add("--compiler", choices=("auto", "eager"), default="auto", help="eager: no generated code")
    add("--model", type=Path, help="folder of a Llama; default: SmolLM2-135M-Instruct (see examples/smollm2.py)")
    add("--arms", type=items(allowed=ARMS), default=DEFAULT_ARMS, help=f"of: {', '.join(ARMS)}")
    add("--ratio", type=float, default=0.25, help="min_tokens_ratio")
    add("--batch", type=int, default=8)
    add("--length", type=int, default=1024)
    add("--marks", type=items(int), default=[25, 50, 100, 200], help="steps; the last one is the end")
    add("--lr", type=float, default=2e-4)
    add("--seed", type=int, default=0)
    add("--held-out", type=int, default=128, help="sequences of the evaluation")
    add("--json", type=Path, default=Path("runs/benchmarks/router_quality.json"))
    add("--tiny", action="store_true", help=f"changes the defaults to {TINY}")
    add("--run", nargs=1, help=argparse.SUPPRESS)  # the arm, in a process of its own
    if "--tiny" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**TINY)
    args = parser.parse_args(argv)
    if args.marks != sorted(set(args.marks)) or args.marks[0] < 1:
        parser.error("--marks must be steps, at least 1, in ascending order")
    for name, least in (("batch", 2), ("length", 2), ("held_out", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}")
    if not 0 < args.ratio < 1:
        parser.error("--ratio must be in (0, 1)")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    if args.model is None:
        from smollm2 import smollm2

        args.model = smollm2(ROOT / "runs" / "smollm2" / "model")
    return args


def packed(part: str, tokenizer: Any, length: int) -> Blocks:
    """The problems of ``train`` or ``test``, joined and cut; every token has a label."""
    pairs = problems(ROOT / "data" / "gsm8k" / f"{part}.jsonl")
    texts = [f"Question: {question}\nAnswer: {answer}{tokenizer.eos_token}\n" for question, answer in pairs]
    ids = torch.tensor([token for each in tokenizer(texts)["input_ids"] for token in each], dtype=torch.int32)
    ids = ids[: len(ids) // length * length].view(-1, length)
    return Blocks(ids, ids.clone())


def run(arm: str, args: argparse.Namespace, prepared: Callable[[], None]) -> dict[str, Any]:
    """Trains to the last mark; what was found. ``prepared`` is called when all is compiled."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).train()
    model.config.use_cache = False
    tokenizer, how = AutoTokenizer.from_pretrained(args.model), ARMS[arm]
    train, test = (packed(part, tokenizer, args.length).to(args.device) for part in ("train", "test"))
    compiler = {"compiler": args.compiler, "cuda_graphs": args.cuda_graphs}
    if isinstance(how, dict):
        step, sequences = build_selective(model, {"min_tokens_ratio": args.ratio, **compiler, **how}), args.batch
    else:
        step, sequences = build_baseline("fair", model, **compiler), round(how * args.batch)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, data, steps = (
        Masters(model, start, weight_decay=0.01),
        batches(train, sequences, args.seed),
        args.marks[-1],
    )

    def train_step(lr: float) -> torch.Tensor:
        if args.device == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        loss = step(*next(data))
        loss.backward()
        optimizer.step(lr)
        return loss.detach().clone()

    for _ in range(3):  # compiles, warms up and records CUDA graphs
        train_step(0.0)
    optimizer, data = Masters(model, start, weight_decay=0.01), batches(train, sequences, args.seed)
    runtime = cggr_compile.runtime(model) if isinstance(how, dict) else None
    if runtime is not None:
        runtime.load_state_dict({"version": 1, "step": 0, "seed": args.seed})  # what it has learned is forgotten
    prepared()
    marks, losses, done = list[dict[str, Any]](), list[torch.Tensor](), 0
    for mark in args.marks:
        _wait(args.device)
        begin = time.perf_counter()
        losses = [train_step(args.lr * share_of_rate(at, steps, max(1, steps // 20))) for at in range(done, mark)]
        _wait(args.device)
        figures = {} if runtime is None else runtime.metrics()
        marks.append(
            {
                "step": mark,
                "step_ms": 1e3 * (time.perf_counter() - begin) / (mark - done),
                "train_loss": float(torch.stack(losses).mean()),
                **{name: figures.get(name) for name in ("score_correlation", "concentration", "level")},
            }
        )
        done = mark
    held_out = Blocks(test.ids[: args.held_out], test.labels[: args.held_out])
    return {"marks": marks, "loss": held_out_loss(model, held_out), "sequences": sequences}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def table(document: dict[str, Any], marks: list[int]) -> Table:
    found = Table(title=document["machine"]["device"])
    columns = [*(f"correlation, step {mark}" for mark in marks), "concentration", "held-out loss", "step ms", "level"]
    for name in ("arm", *columns):
        found.add_column(name, justify="left" if name == "arm" else "right")
    for record in document["results"]:
        if "error" in record:
            found.add_row(record["arm"], "failed")
            continue
        last = record["marks"][-1]
        known = [*(each["score_correlation"] for each in record["marks"]), last["concentration"]]
        found.add_row(
            record["arm"],
            *("–" if figure is None else f"{figure:.3f}" for figure in known),
            *(f"{record['loss']:.4f}", f"{last['step_ms']:.1f}", last["level"] or "–"),
        )
    return found


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    if args.run:
        return answer(lambda answers: run(args.run[0], args, lambda: wait_for_turn(answers)))
    runs = [{"arm": arm} for arm in args.arms]
    document = measure(__file__, argv, runs, args, lambda found: f"{found['loss']:.4f}")
    return conclude(document, table(document, args.marks))


if __name__ == "__main__":
    sys.exit(main())
