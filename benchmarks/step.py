"""Times one training step (forward and backward, no optimizer) of selective training and of dense baselines.

The arms (see arms.py) share one model and one batch and take turns, one step each in every round; the figures are
medians over the rounds after the warm-up, and so are the ratios, `fair` over the arm within a round: how many times
faster, or smaller. On CUDA a measured step follows others without waiting, as in a training loop, and its time is the
period from the end of the one before to its own. Peak memory is over what is allocated between steps; "saved" is what
the forward keeps for the backward. Compile time is the first step; what another arm, or an earlier process with the
same TORCHINDUCTOR_CACHE_DIR, has compiled already is not compiled again, so compile times compare only between
processes with one arm and an empty cache each.

Models with experts (``mixtral-4x2048``, ``qwen3-moe-8x2048``) have 2.6 and 1.3 billion parameters that are active for a
token. ``--turns`` gives every arm a process of its own: all compile at once (step_turns.py), and each is then measured
alone.

The JSON file is written after every arm and every round, so that an interrupted run leaves what it measured.

    python benchmarks/step.py                                             # CPU
    python benchmarks/step.py --device cuda --shapes 135m-16x2048 --json runs/135m.json
    python benchmarks/step.py --device cuda --shapes mixtral-4x2048,qwen3-moe-8x2048 --turns \
        --arms fair,dense-cggr,selective --ratio 0.25,0.05 --repeats 6
    python benchmarks/step.py --merge runs/135m.json runs/1b.json --readme
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import step_turns
from agreement import Disagreement
from arguments import add_run_arguments, check_run_arguments, items
from arms import ARMS, DEFAULT_ARMS, check_fair
from machine import describe
from results import machine_line, markdown, rich_table, save
from rich.console import Console
from rounds import step_run
from shapes import SHAPES
from turns import answer

DEFAULT_SHAPES = {
    "cpu": ["cpu-384"],
    "cuda": ["135m-16x2048", "360m-8x2048", "1b-8x1024", "1b-4x4096", "135m-16x512", "135m-4x512"],
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=items(allowed=SHAPES), help=f"comma-separated, of: {', '.join(SHAPES)}")
    parser.add_argument("--arms", type=items(allowed=ARMS), default=list(DEFAULT_ARMS), help=f"of: {', '.join(ARMS)}")
    parser.add_argument(
        "--ratio", type=items(float), default=[0.25], help="min_tokens_ratio of selective arms; several"
    )
    parser.add_argument("--turns", action="store_true", help="every arm in a process; all compile at once")
    parser.add_argument("--within", type=float, help="of --turns: seconds after which an arm that compiles is ended")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)  # shape and arm, in a process of its own
    add_run_arguments(parser, json=Path("runs/benchmarks/step.json"))
    args = parser.parse_args(argv)
    args.shapes = args.shapes or DEFAULT_SHAPES[args.device]
    if not all(0 < ratio <= 1 for ratio in args.ratio):
        parser.error(f"--ratio must be in (0, 1], got {args.ratio}")
    if args.turns and (args.dump_dir or args.profile):
        parser.error("--turns goes without --dump-dir and --profile")
    check_run_arguments(parser, args)
    return args


def measure(args: argparse.Namespace, argv: list[str], console: Console) -> dict[str, Any]:
    """Runs every shape; the document as it is in the file."""
    document: dict[str, Any] = {"machine": describe(args.device), "results": []}
    check_fair()
    if args.turns:
        step_turns.measure(argv, args, document, lambda line: console.print(line, highlight=False, markup=False))
        return document
    for shape in args.shapes:
        try:
            step_run(shape, args, document, lambda line: console.print(line, highlight=False)).run()
        finally:
            save(document, args.json)
    return document


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    console = Console(width=max(160, Console().width))
    if args.run:
        shape, label = args.run
        return answer(lambda answers: step_turns.run(shape, label, args, answers))
    try:
        documents = (
            [json.loads(path.read_text()) for path in args.merge] if args.merge else [measure(args, argv, console)]
        )
    except Disagreement as error:
        console.print(f"The arms do not compute the same thing: {error}", highlight=False)
        return 1
    for document in documents:
        console.print(machine_line(document["machine"]), highlight=False)
        for result in document["results"]:
            console.print(rich_table(result))
    if args.readme:
        console.print(markdown(documents), highlight=False, soft_wrap=True, markup=False)
    found = [result for document in documents for result in document["results"]]
    records = [record for result in found for record in result["arms"].values()]
    agreed = all("disagreement" not in result for result in found)
    return int(not agreed or any(record["status"] != "ok" for record in records))


if __name__ == "__main__":
    sys.exit(main())
