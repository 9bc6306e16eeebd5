"""Checks every type, each in a process of its own, and writes the table.

``make zoo`` checks what docs/models.json lacks, about ten seconds a type.
``make zoo ZOO='llama bert:masked'`` checks these again.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from zoo import page
from zoo.check import check
from zoo.sizes import OTHERS
from zoo.tiny import causal_types

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="these again; default: those that the results lack")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "models.json")
    parser.add_argument("--seconds", type=float, default=180.0, help="a type that takes longer is a row that says so")
    parser.add_argument("--table", action="store_true", help="check nothing: write the page of the results")
    given = parser.parse_args()
    results = page.load(given.results)
    names = given.types or [name for name in (*causal_types(), *OTHERS) if name not in results["types"]]
    for name in () if given.table else names:
        row = in_a_process(name, given.seconds)
        results["types"][name] = row
        page.save(given.results, results)
        print(page.line(name, row), flush=True)
    given.results.with_suffix(".md").write_text(page.page(results))
    print(page.summary(results))


def in_a_process(name: str, seconds: float) -> dict[str, Any]:
    """``check(name)``; a process that crashes or hangs is a row."""
    context = multiprocessing.get_context("fork")  # transformers is imported once
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(name, sender))
    process.start()
    sender.close()
    try:
        if receiver.poll(seconds):
            row: dict[str, Any] = receiver.recv()
        else:
            process.kill()
            row = {"status": "error", "why": f"not done after {seconds:g} s"}
    except EOFError:
        process.join()
        row = {"status": "error", "why": f"the process ended with {process.exitcode}"}
    process.join()
    return row


def _send(name: str, sender: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("cggr_compile").setLevel(logging.ERROR)
    sender.send(check(name))


if __name__ == "__main__":
    main()
