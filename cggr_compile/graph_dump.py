"""The stages of one graph, after every pass: to files, to the structured trace, and its new nodes to the log."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from cggr_compile import compat
from cggr_compile.graph_text import graph_text, input_names, node_line, pass_of
from cggr_compile.passes.nodes import fake_value
from cggr_compile.report import GraphReport, PassRecord, delta_text

log = logging.getLogger(__name__)


def folder_of(root: str | Path, index: int, training: bool) -> Path:
    """Where the stages of a graph are: the first training graph's in ``root`` itself, others' inside of it."""
    if not training:
        return Path(root) / f"inference_{index:02d}"
    return Path(root) / f"graph_{index:02d}" if index else Path(root)


def read_stages(folder: Path) -> list[tuple[str, str]]:
    """The stages in a folder, in order: names such as ``00_captured``, and texts."""
    return [(file.stem, file.read_text()) for file in sorted(folder.glob("[0-9][0-9]_*.py"))]


class GraphDump:
    """Hands on one graph's numbered stages: ``00_captured.py``, ``01_<pass>.py``, ..., ``report.json``.

    Files are written where there is a folder; the structured trace (``TORCH_TRACE``, tlparse) gets every stage; and a
    logger at level DEBUG the nodes that each pass has added. Without any of these no text is made.

    Args:
        folder: None: no files.
        part: what the graph is, where it is not the one that trains.
    """

    def __init__(self, folder: str | None, report: GraphReport, part: str = "") -> None:
        self.report = report
        self.folder: Path | None = None
        self.count = 0
        self._prefix = f"cggr_{'' if report.training else 'inference_'}{report.index}{part and f'_{part}'}"
        self._inputs: list[tuple[str, Any]] = []  # of the last Dynamo graph: short name, fake value
        self._before: set[str] = set()  # nodes of the stage before, if they are logged
        if folder is not None:
            self.folder = folder_of(folder, report.index, report.training)
            self.folder.mkdir(parents=True, exist_ok=True)

    def stage(self, name: str, module: GraphModule, record: PassRecord | None = None) -> None:
        """The graph now: after the pass of ``record``, or at a turning point of this name."""
        header = [f"# graph {self.report.index}, stage {self.count:02d}: {name}"]
        if record is not None:
            header += [
                f"# pass: {record.name} ({record.stage} graph)",
                f"# matched: {record.matched}",
                f"# reason: {record.reason}",
                f"# operators: {delta_text(record.added, record.removed) or 'unchanged'}",
            ]
        file = f"{self.count:02d}_{name}.py"
        self.count += 1
        names = self._names(module)

        def text() -> str:
            return "\n".join(header) + "\n\n" + graph_text(module, names)

        if self.folder is not None:
            (self.folder / file).write_text(text())
        compat.trace_structured(f"{self._prefix}_{file}", text)
        if log.isEnabledFor(logging.DEBUG):
            self._log_new_nodes(name, module, names)

    def finish(self) -> None:
        """All passes have run."""

        def text() -> str:
            return json.dumps(self.report.as_dict(), indent=2, default=str)

        compat.trace_structured(f"{self._prefix}_report", text)
        if self.folder is not None:
            (self.folder / "report.json").write_text(text())

    def _names(self, module: GraphModule) -> dict[str, str]:
        """Short names of the inputs; a joint graph has those of the Dynamo graph that it was traced from."""
        places = list(module.graph.find_nodes(op="placeholder"))
        joint = [node for node in places if str(node).startswith("primals")]
        if not joint:
            names = input_names(module.graph)
            self._inputs = [(names[str(node)], fake_value(node)) for node in places]
            return names
        if len(joint) != len(self._inputs):
            return {}
        pairs = list(zip(joint, self._inputs, strict=True))
        if not all(_alike(fake_value(node), value) for node, (_, value) in pairs):
            return {}
        return {str(node): name for node, (name, _) in pairs}

    def _log_new_nodes(self, name: str, module: GraphModule, names: dict[str, str]) -> None:
        nodes = [node for node in module.graph.nodes if node.op not in ("placeholder", "output")]
        for node in nodes if self._before else ():
            if str(node) not in self._before and pass_of(node):
                log.debug("%s: + %s", name, node_line(node, names))
        self._before = {str(node) for node in nodes}


def _alike(value: Any, other: Any) -> bool:
    """Whether two tensors may be one: type, and sizes as far as they are numbers (a trace may give them symbols)."""
    if not isinstance(value, Tensor) or not isinstance(other, Tensor):
        return isinstance(value, Tensor) == isinstance(other, Tensor)
    sizes = zip(value.shape, other.shape, strict=False)
    known = all(a == b for a, b in sizes if isinstance(a, int) and isinstance(b, int))
    return value.dtype == other.dtype and value.dim() == other.dim() and known
