"""Times a training step, optimizer included, of data parallel and sharded training on several processes.

The arms (see distributed_arms.py) take turns, one step each in every round; a figure is the median over the rounds of
the slowest process's. Peak memory is one process's: parameters, the optimizer's state, and the most that a step adds
(CUDA only). Scaling is the step of one process by itself over the step of all, on as many tokens each. The reduction is
timed by itself, and as what it adds to forward and backward beside the same without it (``no_sync``,
``set_requires_gradient_sync(False)``): the rest of it is hidden. FSDP's gathering of parameters is not part of it, and
where collectives are inside of the graph only the reduction by itself is timed. The last column is the step of many
cards on paper (``--cards``, ``--gbps``).

Rank 0 writes the JSON file after every arm and every round.

    torchrun --nproc-per-node 2 benchmarks/distributed.py --device cuda --shapes 1b-8x1024,1b-4x4096
    torchrun --nproc-per-node 2 benchmarks/distributed.py --shapes tiny --compiler eager --repeats 2    # rehearsal
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from arguments import add_run_arguments, check_run_arguments, items
from distributed_arms import ARMS, DEFAULT_ARMS
from distributed_results import rich_table
from distributed_run import DistributedRun
from machine import describe
from results import machine_line
from rich.console import Console
from shapes import SHAPES

DEFAULT_SHAPES = {"cpu": ["cpu-384"], "cuda": ["1b-8x1024", "1b-4x4096", "135m-16x2048"]}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=items(allowed=SHAPES), help=f"comma-separated, of: {', '.join(SHAPES)}")
    parser.add_argument("--arms", type=items(allowed=ARMS), default=list(DEFAULT_ARMS), help=f"of: {', '.join(ARMS)}")
    ratios = "min_tokens_ratio of the selective arms, each in (0, 1)"
    parser.add_argument("--ratios", type=items(float), default=[0.25, 0.05], help=ratios)
    parser.add_argument("--cards", type=int, default=64, help="of the step on paper")
    parser.add_argument("--gbps", type=float, default=50.0, help="gigabytes a second that each of these cards sends")
    parser.add_argument("--time-limit", type=float, help="seconds after which no arm and no round is begun")
    parser.add_argument("--one-by-one", action="store_true", help="measure an arm, free it, go on: for large models")
    add_run_arguments(parser, json=Path("runs/benchmarks/distributed.json"))
    args = parser.parse_args(argv)
    args.shapes = args.shapes or DEFAULT_SHAPES[args.device]
    if not all(0 < ratio < 1 for ratio in args.ratios):
        parser.error(f"--ratios must be in (0, 1), got {args.ratios}")
    for name in ("cuda_graphs", "profile", "dump_dir", "readme"):
        if getattr(args, name):
            parser.error(f"--{name.replace('_', '-')} is not for several processes")
    check_run_arguments(parser, args)
    if not args.merge and "RANK" not in os.environ:
        parser.error("start it with torchrun: torchrun --nproc-per-node 2 benchmarks/distributed.py ...")
    return args


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Runs every shape, in every process; the document as it is in the file."""
    begin = time.monotonic()
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # compiling takes minutes, and not equally long in all processes
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo", timeout=datetime.timedelta(minutes=30))
    document: dict[str, Any] = {"machine": describe(args.device), "results": []}

    def say(line: str) -> None:
        if dist.get_rank() == 0:
            console.print(line, highlight=False)

    try:
        for shape in args.shapes:
            DistributedRun(shape, args, document, say, begin).run()
    finally:
        first = dist.get_rank() == 0
        dist.destroy_process_group()
    return document if first else {"results": []}


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    console = Console(width=max(140, Console().width))
    documents = [json.loads(path.read_text()) for path in args.merge] if args.merge else [measure(args, console)]
    for document in documents:
        if "machine" in document:
            console.print(machine_line(document["machine"]), highlight=False)
        for result in document["results"]:
            console.print(rich_table(result, args.cards, args.gbps))
    records = [arm for document in documents for result in document["results"] for arm in result["arms"].values()]
    return int(any(record["status"] != "ok" for record in records))


if __name__ == "__main__":
    sys.exit(main())
