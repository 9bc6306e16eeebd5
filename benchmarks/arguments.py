"""What the benchmarks' command lines have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from typing import Any


def items(kind: Callable[[str], Any] = str, allowed: Collection[Any] = ()) -> Callable[[str], list[Any]]:
    """The ``type`` of an argument that is a comma-separated list; ``allowed``: what may be in it, anything if empty."""

    def parse(text: str) -> list[Any]:
        chosen = [kind(part) for part in text.split(",")]
        if allowed and (unknown := sorted(set(chosen) - set(allowed))):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(allowed)}")
        return chosen

    return parse
