"""Where and why a graph ends before the captured function does."""

from __future__ import annotations

import re
from dataclasses import dataclass
from traceback import FrameSummary
from types import CodeType
from typing import Any, NoReturn

from cggr_compile.compat.frames import translator


@dataclass(frozen=True)
class GraphBreak:
    """A graph break: Dynamo's reason, and where, from the captured frame inwards (at least one place)."""

    reason: str
    stack: tuple[FrameSummary, ...]

    @property
    def setting(self) -> str:
        """The name in ``torch._dynamo.config`` that Dynamo says to make True; empty: it names none."""
        found = re.search(r"torch\._dynamo\.config\.(\w+) = True", self.reason)
        return found[1] if found else ""


def graph_breaks() -> list[GraphBreak]:
    """Those since the last ``torch._dynamo.reset()``, oldest first; a function that is skipped whole leaves none."""
    from torch._dynamo.utils import graph_break_reasons

    # "step_unsupported" is where, outside of the function that broke, the graph ended
    return [found for r in graph_break_reasons if r.reason != "step_unsupported" and (found := _graph_break(r))]


def break_at_end() -> GraphBreak | None:
    """The break that ends the graph under compilation, if one does."""
    tx = translator()
    reason = None if tx is None else tx.output.compile_subgraph_reason
    return None if reason is None or not reason.graph_break else _graph_break(reason)


def nested_graph_breaks() -> bool:
    """Whether a graph that begins behind a break in a function goes on in the function's callers."""
    from torch._dynamo import config

    return bool(config.nested_graph_breaks)


def capture_again() -> NoReturn:
    """Have Dynamo capture the frame under compilation from its start, and try again where it broke the graph."""
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis  # the one that passes a backend

    tx = translator()
    assert tx is not None
    tx.speculation_log.clear()  # where it broke
    raise TensorifyScalarRestartAnalysis(restart_reason="cggr: what broke the graph is gone")


def resumed_at(code: CodeType) -> int | None:
    """The line of its file at which a frame goes on after a graph break; None for the code of a whole function."""
    found = re.match(r"torch_dynamo_resume_in_.*_at_(\d+)", code.co_name)
    return int(found[1]) if found else None


def _graph_break(reason: Any) -> GraphBreak | None:
    return GraphBreak(reason.reason, tuple(reason.user_stack)) if reason.user_stack else None
