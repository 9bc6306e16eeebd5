"""Held-out loss over all tokens, against measured seconds of training: does selecting tokens pay?

Every arm (see quality_arms.py) trains the same model on the same text through its real compiled step until it has used
the same number of measured seconds, and is compared with dense training, with dense training on half the batch, and
with dense training for half the time. Only training steps count as seconds (see quality_run.py). With several learning
rates every arm first tries each in a short run, and then uses its own best one for all the seeds.

Regimes: `scratch`, random weights, on the Python sources and documentation that the machine has; `finetune`, from a
base that is trained on that text first (densely; kept in --cache), on GSM8K; `prompted`, the same with one and the
same prompt of solved problems (--shots) in front of every problem, trained on as well but not in the held-out loss;
`sft`, with labels on answers only, behind prompts of other solved problems.

A run takes what time it takes: --time-limit stops before a run that would go beyond it, the results so far are in
--out, and the same command goes on from there. Written are quality.json, quality.txt (table) and quality.png (plot).

    python benchmarks/quality.py --device cuda --cuda-graphs --batches 65536 --time-limit 540
    python benchmarks/quality.py --regimes finetune --arms dense,random --arm 'mine={"min_tokens_ratio": 0.5}' ...
    python benchmarks/quality.py --tiny                                           # CPU, less than a minute
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from arguments import items
from quality_arms import ARMS, DEFAULTS, parse_arm
from quality_run import SIZES
from quality_study import BATCHES, RATES, SECONDS, Study
from rich.console import Console

TINY = dict(
    device="cpu",
    compiler="eager",
    regimes=["scratch"],
    batches=[1024],
    arms=["dense", "random"],
    model="nano",
    length=64,
    lrs=[3e-3],
    seeds=1,
    seconds=2.0,
    megabytes=1.0,
    held_out=8192,
    evaluations=4,
    base_seconds=2.0,
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cuda-graphs", action="store_true", help="for every arm; small models are launch-bound")
    parser.add_argument("--compiler", choices=("auto", "eager"), default="auto", help="eager: no generated code")
    parser.add_argument("--regimes", type=items(allowed=DEFAULTS), default=["scratch"], help=", ".join(DEFAULTS))
    parser.add_argument("--batches", type=items(int), help=f"tokens a step; default: {BATCHES}")
    parser.add_argument("--arms", type=items(allowed=ARMS), help=f"of: {', '.join(ARMS)}; default: {DEFAULTS}")
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="one more: backend options, batch, budget, warmup",
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--lrs", type=items(float), help=f"learning rates to choose from; default: {RATES}")
    parser.add_argument("--seconds", type=float, help=f"measured seconds of each run; default: {SECONDS}")
    parser.add_argument("--sweep-share", type=float, default=0.25, help="of the seconds, for trying a learning rate")
    parser.add_argument("--model", choices=SIZES, default="23m")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--shots", type=int, default=2, help="solved problems in a prompt")
    parser.add_argument("--megabytes", type=float, default=160.0, help="of text, at most")
    parser.add_argument("--held-out", type=int, default=262144, help="tokens of every evaluation")
    parser.add_argument("--evaluations", type=int, default=8, help="in a run, at equal times")
    parser.add_argument("--base-seconds", type=float, default=60.0, help="training of the base, of 65536-token steps")
    parser.add_argument("--base-lr", type=float, default=2e-3)
    parser.add_argument("--cache", type=Path, default=Path("runs/quality-cache"), help="folder for text and base")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), help="folder for the results")
    parser.add_argument(
        "--time-limit", type=float, default=float("inf"), help="seconds of this command; 0: only report"
    )
    parser.add_argument("--retry", action="store_true", help="run again what failed before")
    parser.add_argument("--tiny", action="store_true", help=f"changes the defaults to {TINY}")
    if "--tiny" in (sys.argv[1:] if argv is None else argv):
        parser.set_defaults(**TINY)
    args = parser.parse_args(argv)
    try:
        args.extra = dict(parse_arm(text) for text in args.arm)
    except ValueError as error:
        parser.error(f"--arm: {error}")
    if taken := sorted(set(args.extra) & set(ARMS)):
        parser.error(f"--arm: {', '.join(taken)}: the table has an arm of that name")
    for name, least in (("seeds", 1), ("evaluations", 1), ("length", 1), ("shots", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}")
    if not 0 < args.sweep_share <= 1 or (args.seconds is not None and args.seconds <= 0):
        parser.error("--sweep-share must be in (0, 1] and --seconds above 0")
    if args.device == "cuda" and args.time_limit > 0 and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    if args.cuda_graphs and args.device != "cuda":
        parser.error("--cuda-graphs needs --device cuda")
    for regime in args.regimes:
        for batch in args.batches or BATCHES[regime]:
            if batch % (2 * args.length):
                parser.error(f"--batches: {batch} is not an even number of sequences of {args.length}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    console = Console(width=max(180, Console().width))
    study = Study(args, console)
    if args.time_limit > 0:
        study.plan()
        try:
            study.prepare()
            study.run()
        except ValueError as error:
            console.print(f"error: {error}", highlight=False)
            return 2
        except KeyboardInterrupt:
            console.print("Interrupted: this is what has been measured so far.")
    study.report()
    return int(any(r["status"] != "ok" for r in study.results))


if __name__ == "__main__":
    sys.exit(main())
