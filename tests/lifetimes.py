"""What Inductor's generated code has in memory at each of its lines, and in which order it calls collectives."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch._inductor import config
from torch._inductor.graph import GraphLowering

_SIZE = r"\(([^()]*)\), \([^()]*\)"
_EMPTY = re.compile(rf"(\w+) = empty_strided\w*\({_SIZE}, torch\.(\w+)\)")
_CALL = re.compile(r"(\w+) = torch\.ops\.(\w+)\.(\w+)\.\w+\((\w+)")
_WAIT = re.compile(r"torch\.ops\._c10d_functional\.wait_tensor\.default\((\w+)\)")
_ALIAS = re.compile(r"(\w+) = (?:reinterpret_tensor\()?(\w+)(?:[,;\[]|$)")
_PRODUCT = re.compile(r"extern_kernels\.\w*mm\(")


class Generated(Exception):
    """All graphs are written."""


def codes_of(step: Callable[[], Any], graphs: int) -> list[str]:
    """What is written for the first ``graphs`` graphs of ``step``; it is neither compiled nor run."""
    codes: list[str] = []

    def keep(self: Any) -> Any:
        codes.append(self.codegen()[0].value)
        if len(codes) == graphs:
            raise Generated
        outputs, names = self.graph_outputs, list(self.graph_input_names)
        return SimpleNamespace(__file__="", call=lambda inputs: [_result(one, names, inputs) for one in outputs])

    try:
        with config.patch(force_disable_caches=True), patch.object(GraphLowering, "compile_to_module", keep):
            step()
    except Exception as error:  # PyTorch's, which has Generated for its cause
        if "Generated" not in str(error):
            raise
    assert len(codes) == graphs
    return codes


def _result(output: Any, names: list[str], inputs: list[Any]) -> Any:
    """An input that is returned, or zeros."""
    if hasattr(output, "get_name") and output.get_name() in names:
        return inputs[names.index(output.get_name())]
    if not hasattr(output, "layout") and not hasattr(output, "data"):
        return None
    layout = output.get_layout()
    size, stride = [int(n) for n in layout.size], [int(n) for n in layout.stride]
    return torch.empty_strided(size, stride, dtype=layout.dtype).zero_()


@dataclass
class Lifetimes:
    """Of one graph's code.

    Attributes:
        peak: the most bytes at a time, of each kind and of ``all``: ``gathered`` by a collective, ``unreduced`` (given
            to one and not waited for) and anything else made here. Arguments do not count, collectives are of float32.
        order: ``gather``, ``reduce`` (started), ``wait`` and ``product``, with the name of what is waited for.
    """

    peak: Counter[str] = field(default_factory=Counter)
    order: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def of(cls, code: str) -> Lifetimes:
        found = cls()
        lines = [line.strip() for line in code[code.index("def call(") :].splitlines()]
        names: dict[str, int] = {}  # of what was made at a line
        size: dict[int, int] = {}
        kind: dict[int, str] = {}
        running: dict[str, int] = {}  # what is being reduced, by the name of the result
        for at, line in enumerate(lines):
            if made := _EMPTY.match(line):
                names[made[1]], size[at] = at, _bytes(made[2], made[3])
            elif (made := _CALL.match(line)) and made[2] == "_c10d_functional":
                checked = next(
                    filter(None, (re.search(rf"\({made[1]}, {_SIZE}", one) for one in lines[at + 1 : at + 3]))
                )
                gathers = made[3].startswith("all_gather")
                argument = names.get(made[4])
                names[made[1]], size[at] = at, _bytes(checked[1], "float32")
                kind[at] = "gathered" if gathers else "reduced"
                found.order.append(("gather" if gathers else "reduce", made[1]))
                if not gathers and argument is not None:
                    running[made[1]] = argument
            elif waits := _WAIT.match(line):
                running.pop(waits[1], None)
                found.order.append(("wait", waits[1]))
            elif (made := _ALIAS.match(line)) and made[2] in names:
                names[made[1]] = names[made[2]]
            elif _PRODUCT.match(line):
                found.order.append(("product", ""))
            for name in re.findall(r"(?:^|; )del (\w+)", line):
                names.pop(name, None)
            alive, sums = set(names.values()), Counter()
            for one in alive:
                unreduced = one in running.values()
                sums["unreduced" if unreduced else kind.get(one, "other")] += size[one]
                sums["all"] += size[one]
            found.peak |= sums
        return found


def _bytes(size: str, dtype: str) -> int:
    return prod(int(n) for n in size.split(",") if n.strip()) * getattr(torch, dtype).itemsize


def in_flight(order: list[tuple[str, str]], kind: str) -> list[int]:
    """How many products there are between each start of such a collective and the wait for it."""
    done, found = 0, {}
    for event, name in order:
        if event == "product":
            done += 1
        elif event == "wait" and name in found:
            found[name] = done - found[name]
        elif event == kind:
            found[name] = done
    return list(found.values())
