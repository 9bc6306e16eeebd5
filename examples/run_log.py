"""What a training run measured: losses, times, memory. Kept in the checkpoint, shown as a table at the end."""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from rich.table import Table

WARM_UP = 2  # steps of a process that compile, or record CUDA graphs: kept out of every time below


@dataclass
class RunLog:
    """Measurements of a run; a resumed one goes on with the lists.

    Attributes:
        losses: of every step.
        seconds: of every step but those that compile; an average over the steps between two looks at the device.
        tokens: of every step, without padding.
        held_out: (steps done, loss of the held-out answers).
        peak_memory_gb: CUDA: most memory that training steps held; else of the whole process.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    first_seconds: float = 0.0
    peak_memory_gb: float = 0.0

    def __post_init__(self) -> None:
        self._seen = 0
        self._start = time.perf_counter()

    def start(self, device: str) -> None:
        """Training goes on now: what came before (an evaluation, a checkpoint) counts for nothing."""
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self._start = time.perf_counter()

    def add(self, losses: list[torch.Tensor], device: str) -> None:
        """The steps since :meth:`start` or the last call, by their losses. Waits for the device."""
        self.losses += torch.stack(losses).tolist()
        now = time.perf_counter()
        if self._seen < WARM_UP:
            self.first_seconds += now - self._start
        else:
            self.seconds += [(now - self._start) / len(losses)] * len(losses)
        self._seen += len(losses)
        self._start = now
        self.peak_memory_gb = max(self.peak_memory_gb, _memory_gb(device))

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    @property
    def step_seconds(self) -> float | None:
        """The median step's; None before one was timed."""
        return median(self.seconds) if self.seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.step_seconds is None else mean(self.tokens) / self.step_seconds

    def note(self) -> str:
        """For the progress bar."""
        speed = "compiling" if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f} tokens/s"
        loss = f", loss {mean(self.losses[-10:]):.3f}" if self.losses else ""
        held_out = f", held-out {self.held_out[-1][1]:.3f}" if self.held_out else ""
        memory = f", {self.peak_memory_gb:.1f} GB" if self.peak_memory_gb else ""
        return speed + loss + held_out + memory

    def summary(self, device: str) -> dict[str, float | int | None]:
        """The lines of the report."""
        process = "" if device == "cuda" else " of the process"
        ends = self.held_out[:1] + self.held_out[1:][-1:]
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return {
            "steps": len(self.losses),
            "training loss, mean of the last tenth": mean(last) if last else None,
            **{f"held-out loss after {step} steps": loss for step, loss in ends},
            "tokens/s, without padding": self.tokens_per_second,
            "seconds per step, median": self.step_seconds,
            "seconds of the first steps, which compile": self.first_seconds,
            f"peak memory{process}, GB": self.peak_memory_gb,
        }

    def write(self, path: Path, setup: dict[str, Any], device: str) -> None:
        """Everything as JSON."""
        document = {**setup, "summary": self.summary(device), **asdict(self)}
        path.write_text(json.dumps(document, indent=1, default=str), encoding="utf-8")


def table(title: str, lines: dict[str, float | int | None]) -> Table:
    result = Table(title=title, title_justify="left", show_header=False)
    for name, value in lines.items():
        shown = "–" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
        result.add_row(name, shown)
    return result


def _memory_gb(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
