"""Runs the cases of several processes: ``python distributed_worker.py RANK WORLD FOLDER CASE ...``.

A CASE is a name, or ``quick`` or ``slow``. Started by semantics/conftest.py. What a case has computed, or its
traceback, is written to ``FOLDER/RANK.pt``.
"""

from __future__ import annotations

import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import ddp_cases
import decision_cases
import fsdp_cases
import shard_cases
import torch
import torch.distributed as dist

from cggr_compile import agreement

LIMIT = timedelta(seconds=60)


def attempt(function: Any, *arguments: Any) -> Any:
    torch._dynamo.reset()
    try:
        return function(*arguments)
    except Exception:
        print(failure := traceback.format_exc(), file=sys.stderr, flush=True)
        return failure
    finally:
        dist.barrier()  # one that has failed has left the others behind


def chosen_of(cases: Any, chosen: list[str]) -> list[str]:
    """In the same order in every process."""
    kinds = {case: "slow" if case in cases.SLOW else "quick" for case in cases.CASES}
    return [case for case, kind in kinds.items() if case in chosen or kind in chosen]


def main() -> None:
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    chosen = sys.argv[4:]
    address = f"file://{folder / 'store'}"
    assert LIMIT.total_seconds() < agreement.PATIENCE, "who waits for a decision fails here"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world, timeout=LIMIT)
    dist._DEFAULT_FIRST_BUCKET_BYTES = ddp_cases.BUCKET
    results = {}
    for cases in (ddp_cases, decision_cases, fsdp_cases, shard_cases):
        for case in chosen_of(cases, chosen):
            began = time.monotonic()
            results[case] = attempt(cases.run, case, rank, folder)
            print(f"rank {rank}: {case}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
