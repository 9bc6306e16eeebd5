"""Which of a model's blocks each call of a graph belongs to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import Tensor
from torch.fx import Graph, Node

from cggr_compile import compat


def block_of(path: str) -> str:
    """A module path up to its first number, such as model.layers.0; "" where there is none."""
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ""


def blocks_of(graph: Graph) -> dict[Node, str]:
    """The block of every node; "" where it is none, or not known.

    A sum of gradients does not say where it is. It is of the first of the blocks that its operands are of.
    """
    found: dict[Node, str] = {}
    for node in graph.nodes:
        stack = next((node.meta[name] for name in compat.MODULE_STACKS if node.meta.get(name)), None)
        if stack is not None:
            *_, (path, _) = stack.values()
            found[node] = block_of(".".join(path.split(".")[1:]))
        else:
            before = (found[one] for one in node.all_input_nodes if _is_real(one))
            found[node] = min((block for block in before if block), key=_place, default="")
    return found


def listed(blocks: Iterable[str]) -> list[str]:
    """The paths of the blocks in order; of several lists of such those of the longest."""
    paths = {path for path in blocks if path}
    lists = Counter(path.rsplit(".", 1)[0] for path in paths)
    longest = max(sorted(lists), key=lambda name: lists[name], default=None)
    return sorted((p for p in paths if p.rsplit(".", 1)[0] == longest), key=_place)


def _place(block: str) -> int:
    return int(block.rsplit(".", 1)[-1])


def _is_real(node: Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or value.is_floating_point()
