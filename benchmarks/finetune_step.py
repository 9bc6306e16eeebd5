"""Times a fine-tuning step (forward and backward, no optimizer): prompts without labels, answers at the end with them.

Every arm (see finetune_arms.py) computes the loss of the same labelled tokens, the last ``--shares`` percent of each
sequence; ours also gives ``--context`` positions before them their gradient. What is measured, and how, is step.py's:
arms share one model and take turns, figures are medians, × is how many times faster, or smaller, than `fair`. Arms that
do not depend on the labels are compiled once for all shares. With ``--lora R`` the model is frozen and adapters of rank
R are trained (PEFT; float32 adapters, bfloat16 autocast).

Compile beforehand, side by side, with ``--repeats 0``: processes with one TORCHINDUCTOR_CACHE_DIR find in it what
another has compiled. Then time alone.

``--longest`` searches instead for the longest sequence of which a step fits on the device: one sequence of the shape's
model with ``--labelled`` labelled tokens, every length tried in a process of its own.

    python benchmarks/finetune_step.py                                        # the CPU rehearses with a tiny model
    python benchmarks/finetune_step.py --device cuda --shapes 1b-4x4096 --json runs/1b.json
    python benchmarks/finetune_step.py --device cuda --shapes 135m-8x2048 --cuda-graphs --json runs/135m.json
    python benchmarks/finetune_step.py --device cuda --shapes 8b-4x2048 --lora 16 --json runs/lora.json
    python benchmarks/finetune_step.py --device cuda --shapes 1b-4x4096 --longest --json runs/longest.json
    python benchmarks/finetune_step.py --merge runs/1b.json runs/lora.json --readme
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from agreement import Disagreement
from arguments import add_run_arguments, check_run_arguments, items
from arms import check_fair
from finetune_arms import ARMS, FinetuneArms, build_trained, labelled_tokens
from longest import longest, longest_table
from machine import describe
from results import machine_line, markdown, rich_table, save
from rich.console import Console
from rounds import ShapeRun
from shapes import SHAPES, make_batch

DEFAULT_SHAPES = {"cpu": ["tiny"], "cuda": ["1b-4x4096"]}
LONGEST_ARMS = ["fair", "fair-checkpointed", "ours", "ours-stop"]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=items(allowed=SHAPES), help=f"comma-separated, of: {', '.join(SHAPES)}")
    parser.add_argument("--arms", type=items(allowed=ARMS), help=f"of: {', '.join(ARMS)}")
    parser.add_argument("--shares", type=items(float), default=[5.0, 10.0, 25.0], help="percent of labelled tokens")
    parser.add_argument("--context", type=int, default=128, help="positions before the labels, of ours and ours-stop")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train adapters of this rank only")
    add_run_arguments(parser, json=Path("runs/benchmarks/finetune_step.json"))
    parser.add_argument("--longest", action="store_true", help="search for the longest sequence that fits instead")
    parser.add_argument("--labelled", type=int, default=512, help="--longest: labelled tokens at the sequence's end")
    parser.add_argument("--start", type=int, default=16384, help="--longest: the first length")
    parser.add_argument("--granularity", type=int, default=1024, help="--longest: lengths are multiples of it")
    parser.add_argument("--most", type=int, help="--longest: nothing longer is tried; on the CPU twice --start")
    parser.add_argument("--minutes", type=float, default=9.0, help="--longest: time for each arm")
    args = parser.parse_args(argv)
    args.shapes = args.shapes or DEFAULT_SHAPES[args.device]
    args.arms = args.arms or (LONGEST_ARMS if args.longest else list(ARMS))
    if args.most is None and args.device == "cpu":
        args.most = 2 * args.start  # its memory is not a figure
    if not all(0 < share <= 100 for share in args.shares):
        parser.error(f"--shares must be in (0, 100], got {args.shares}")
    if args.context < 0 or (args.lora is not None and args.lora < 1):
        parser.error("--context must be at least 0 and --lora at least 1")
    if min(args.granularity, args.labelled) < 1 or args.start % args.granularity or args.start < args.granularity:
        parser.error("--granularity and --labelled must be at least 1, and --start a multiple of --granularity")
    check_run_arguments(parser, args)
    return args


def measure(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs every shape; the document as it is in the file."""
    document: dict[str, Any] = {"machine": describe(args.device), "results": [], "longest": []}
    check_fair()
    for name in args.shapes:
        try:
            if args.longest:
                for arm in args.arms:
                    longest(arm, name, args, document, say)
            else:
                _steps(name, args, document, say)
        finally:
            save(document, args.json)
    return document


def _steps(name: str, args: argparse.Namespace, document: dict[str, Any], say: Callable[[str], None]) -> None:
    torch._dynamo.reset()
    model = build_trained(SHAPES[name], args)
    arms = FinetuneArms(model, args, length=SHAPES[name].length)
    for share in args.shares:
        _steps_of_share(name, share, arms, document, say)


def _steps_of_share(
    name: str, share: float, arms: FinetuneArms, document: dict[str, Any], say: Callable[[str], None]
) -> None:
    shape, args = SHAPES[name], arms.args
    labelled = labelled_tokens(share / 100, shape.length)
    lora = f", LoRA r = {args.lora}" if args.lora is not None else ""
    facts = {"share": share, "labelled": labelled, "context": args.context, "lora": args.lora}
    facts["workload"] = f"{share:g} % labels, context {args.context}{lora}"
    batch = make_batch(shape, device=args.device, labelled=labelled)
    named = arms.of(labelled, f"{name}-{share:g}")
    ShapeRun(name, named, arms.model, batch, args, document, lambda line: say(f"{share:g} %: {line}"), facts).run()


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    console = Console(width=max(150, Console().width))

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    try:
        documents = [json.loads(path.read_text()) for path in args.merge] if args.merge else [measure(args, say)]
    except Disagreement as error:
        say(f"The arms do not compute the same thing: {error}")
        return 1
    for document in documents:
        say(machine_line(document["machine"]))
        for result in document["results"]:
            console.print(rich_table(result))
    searches = [result for document in documents for result in document["longest"]]
    if searches:
        console.print(longest_table(searches))
    if args.readme:
        console.print(markdown(documents, more=True), highlight=False, soft_wrap=True, markup=False)
    records = [arm for document in documents for result in document["results"] for arm in result["arms"].values()]
    return int(any(record["status"] == "failed" for record in records))


if __name__ == "__main__":
    sys.exit(main())
