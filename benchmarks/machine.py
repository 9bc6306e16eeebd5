"""What a result was measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch


def describe(device: str) -> dict[str, Any]:
    """Names and versions; the load average says how quiet the machine was when the run began."""
    policy = os.environ.get("OMP_WAIT_POLICY")  # passive: the selective arms are slower
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": f"{torch.get_num_threads()} CPU threads{f' (OMP_WAIT_POLICY={policy})' if policy else ''}",
        "load": os.getloadavg(),
        "torch": f"torch {torch.__version__}",
        "triton": f"triton {_version('triton')}",
        "transformers": f"transformers {_version('transformers')}",
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
    }


def _version(package: str) -> str:
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else "none"


def _processor() -> str:
    """The processor's name where the system tells (Linux), else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
