"""Measurements in processes of their own that take turns: all prepare at once, each measures while the others wait.

A process writes JSON objects to its standard output, one a line: ``{"ready": true}`` before it measures
(`wait_for_turn`), and its result at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from machine import describe
from results import save
from rich.console import Console
from rich.table import Table

LAST_LINES = 12  # of a log, in an error


def cards(device: str) -> list[str]:
    """What CUDA_VISIBLE_DEVICES is for the processes, in turn."""
    if device == "cpu":
        return [""]
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return named if named != [""] else [str(index) for index in range(torch.cuda.device_count())]


def wait_for_turn(answers: TextIO) -> None:
    """In a process that `in_turns` began: says that it has prepared, and waits until the others wait or have ended.

    Raises:
        SystemExit: whoever began it has ended, and would no longer keep the others waiting.
    """
    print(json.dumps({"ready": True}), file=answers, flush=True)
    if not sys.stdin.readline():
        raise SystemExit("nobody waits for the measurement any more")


def in_turns(
    commands: Mapping[str, Sequence[str]],
    devices: Sequence[str],
    logs: Path,
    at_once: int | None = None,
    within: float | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each command's name and result, in order; ``{"error": ...}``, the end of its log, of one that failed.

    ``devices``: CUDA_VISIBLE_DEVICES of the processes, in turn. ``logs``: folder of what they print. ``at_once``: how
    many prepare at a time, all by default. ``within``: seconds, after which one that still prepares is ended.
    """
    logs.mkdir(parents=True, exist_ok=True)
    names = list(commands)
    for first in range(0, len(names), at_once or len(names)):
        some = names[first : first + (at_once or len(names))]
        processes = {
            name: _Process(commands[name], devices[index % len(devices)], logs / f"{name}.log")
            for index, name in enumerate(some, first)
        }
        deadline = None if within is None else time.monotonic() + within
        try:
            for process in processes.values():
                process.prepare(deadline)
            for name, process in processes.items():
                yield name, process.measure()
        finally:
            for process in processes.values():
                process.end()


def measure(
    script: str | Path,
    argv: Sequence[str],
    runs: Sequence[Mapping[str, Any]],
    args: argparse.Namespace,
    said: Callable[[dict[str, Any]], str],
) -> dict[str, Any]:
    """All runs of a benchmark; its document, which is saved after each one.

    A run is ``script *argv --run VALUE...`` with the values that tell it, which begin its record. ``said``: what is
    printed of one that has not failed. ``args``: ``device`` and ``json``; ``at_once`` and ``within`` if it has them.
    """
    console = _console()
    document: dict[str, Any] = {"machine": describe(args.device), "results": []}
    named = {"-".join(map(str, run.values())): run for run in runs}
    begin = [sys.executable, str(script), *argv, "--run"]
    commands = {name: [*begin, *map(str, run.values())] for name, run in named.items()}
    logs = args.json.parent / f"{args.json.stem}-logs"
    limits = {name: getattr(args, name, None) for name in ("at_once", "within")}
    for name, found in in_turns(commands, cards(args.device), logs, **limits):
        document["results"].append({**named[name], **found})
        called = ", ".join(map(str, named[name].values()))
        console.print(f"{called}: {found['error'] if 'error' in found else said(found)}", highlight=False, markup=False)
        save(document, args.json)
    return document


def conclude(document: dict[str, Any], table: Table) -> int:
    """Prints the table; the exit status, 1 if a run has failed."""
    _console().print(table)
    return int(any("error" in record for record in document["results"]))


def answer(run: Callable[[TextIO], dict[str, Any]]) -> int:
    """In a run's process: its result goes to standard output, and what trainers print, which is none, to the log."""
    answers, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps(run(answers), default=str), file=answers, flush=True)
    return 0


def _console() -> Console:
    return Console(width=max(130, Console().width))


class _Process:
    def __init__(self, command: Sequence[str], card: str, log: Path) -> None:
        self._log = log
        with log.open("w") as errors:
            self._running = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": card},
            )
        self._found: dict[str, Any] | None = None

    def prepare(self, deadline: float | None) -> None:
        """Waits until it is ready, or has ended; ends it at the deadline."""
        assert self._running.stdout is not None
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([self._running.stdout], [], [], left)[0]:
            self._found = {"error": "it had not prepared in time"}
            self.end()
            return
        answer = self._answer()
        if not answer.get("ready"):
            self._found = answer

    def measure(self) -> dict[str, Any]:
        if self._found is None:
            assert self._running.stdin is not None
            self._running.stdin.write("go\n")
            self._running.stdin.flush()
            self._found = self._answer()
            self._running.wait()  # what it holds of the device is free for the next one
        return self._found

    def _answer(self) -> dict[str, Any]:
        assert self._running.stdout is not None
        line = self._running.stdout.readline()
        if not line:
            return {"error": "\n".join(self._log.read_text().strip().splitlines()[-LAST_LINES:])}
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        self._running.kill()
        self._running.wait()
