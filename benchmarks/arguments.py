"""What the benchmarks' command lines have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch


def items(kind: Callable[[str], Any] = str, allowed: Collection[Any] = ()) -> Callable[[str], list[Any]]:
    """The ``type`` of an argument that is a comma-separated list; ``allowed``: what may be in it, anything if empty."""

    def parse(text: str) -> list[Any]:
        chosen = [kind(part) for part in text.split(",")]
        if allowed and (unknown := sorted(set(chosen) - set(allowed))):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(allowed)}")
        return chosen

    return parse


def add_run_arguments(parser: argparse.ArgumentParser, *, json: Path) -> None:
    """What every benchmark of steps can be told; ``json``: where its result is by default."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=15, help="rounds; 0: compile and warm up only")
    parser.add_argument("--json", type=Path, default=json)
    parser.add_argument("--cuda-graphs", action="store_true", help='mode="reduce-overhead" for every arm')
    parser.add_argument("--compiler", choices=("auto", "eager"), default="auto", help="eager: no generated code")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape's model has, to rehearse")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights, instead of the shape's")
    parser.add_argument("--dump-dir", type=Path, help="folder for the graphs of the selective arms")
    parser.add_argument("--profile", action="store_true", help="kernel times of every arm, into the folder of --json")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="measure nothing: show these JSON files")
    parser.add_argument("--readme", action="store_true", help="also print the table as Markdown")


def check_run_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with a message where they make no sense."""
    if args.repeats < 0 or (args.layers is not None and args.layers < 1):
        parser.error("--repeats must be at least 0 and --layers at least 1")
    if args.cuda_graphs and args.device != "cuda":
        parser.error("--cuda-graphs needs --device cuda")
    if args.device == "cuda" and not args.merge and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
