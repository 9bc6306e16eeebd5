"""In which modes each node of a Dynamo graph runs: grad mode, inference mode, autocast, levels of ``torch.vmap``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from cggr_compile import compat
from cggr_compile.passes.analysis.effects import mutated_operand
from cggr_compile.passes.nodes import fake_value

Cast = tuple[str, bool, torch.dtype]  # device type, enabled, dtype


@dataclass(frozen=True)
class Modes:
    """The state that a node runs in. Equal where a region has been left and the earlier state has come back.

    Attributes:
        grad, inference: grad mode and inference mode.
        casts: autocast per device type, sorted, where the graph has set it to something else than its caller.
        levels: the calls that opened the levels of ``torch.vmap`` (and ``torch.func.grad``, ``jvp``).
        unknown: the last call that changes something nobody here knows.
    """

    grad: bool
    inference: bool
    casts: tuple[Cast, ...] = ()
    levels: tuple[Node, ...] = ()
    unknown: Node | None = None

    @property
    def records(self) -> bool:
        """Whether what runs here has a gradient."""
        return self.grad and not self.inference

    def cast(self, kind: str) -> Cast:
        """Autocast on a device type."""
        return next((cast for cast in self.casts if cast[0] == kind), _outer_cast(kind))

    def casts_unlike(self, other: Modes) -> list[Cast]:
        """Of the device types on which arithmetic is another than in ``other``, how it is here."""
        kinds = sorted({kind for kind, _, _ in (*self.casts, *other.casts)})
        pairs = [(self.cast(kind), other.cast(kind)) for kind in kinds]
        return [mine for mine, theirs in pairs if mine != theirs and (mine[1] or theirs[1])]

    def product_dtype(self, tensor: torch.Tensor) -> torch.dtype:
        """The dtype that products of ``tensor`` run in here: autocast's, where it is on."""
        _, enabled, dtype = self.cast(tensor.device.type)
        return dtype if enabled else tensor.dtype

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Compute under this grad mode and autocast. Under ``no_grad`` for inference mode, as Dynamo does."""
        with ExitStack() as state:
            if self.records != torch.is_grad_enabled():
                state.enter_context(torch.set_grad_enabled(self.records))
            for kind, enabled, dtype in self.casts:
                state.enter_context(torch.autocast(kind, dtype, enabled=enabled))
            yield


def cast_as(modes: Modes, other: Modes) -> Modes:
    """``modes``, with the autocast of ``other``."""
    return replace(modes, casts=other.casts)


def _outer_cast(kind: str) -> Cast:
    return kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def modes_of(graph: Graph) -> dict[Node, Modes]:
    """The modes of every node of a Dynamo graph; those of a call that changes them are the ones before it.

    Dynamo hands a graph over in the modes that it starts in.
    """
    modes = Modes(torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    found: dict[Node, Modes] = {}
    for node in graph.nodes:
        found[node] = modes
        modes = _after(node, modes, found)
    return found


def changes_modes(node: Node) -> bool:
    """Whether a call changes the modes of the nodes behind it."""
    return node.op == "call_function" and (node.target in _SWITCHES or compat.enters_or_leaves_vmap(node))


def has_effect(node: Node) -> bool:
    """Whether a node matters though nobody reads it: it writes, raises or changes the modes of what follows."""
    return node.is_impure() or mutated_operand(node) is not None or changes_modes(node)


def remove_dead_code(graph: Graph) -> None:
    """Erase what nobody reads and has no effect.

    ``Graph.eliminate_dead_code`` would go on in the bodies of higher-order operators, without ``has_effect``: there it
    erases writes, such as the ``scatter_add_`` of a backward pass of the user's.
    """
    for node in reversed(graph.nodes):
        if not node.users and not has_effect(node):
            graph.erase_node(node)


def switches_recording(node: Node) -> bool:
    """Whether a call changes whether, or how, operations are recorded for the backward pass."""
    hooks = getattr(node.target, "__name__", "").startswith("_saved_tensors_hooks")
    return hooks or node.target in (compat.SET_GRAD, compat.ENTER_INFERENCE, compat.EXIT_INFERENCE)


_SWITCHES = {
    *(compat.SET_GRAD, compat.ENTER_AUTOCAST, compat.EXIT_AUTOCAST),
    *(compat.ENTER_INFERENCE, compat.EXIT_INFERENCE),
}


def _after(node: Node, modes: Modes, found: dict[Node, Modes]) -> Modes:
    """The modes behind a node."""
    if node.op not in ("call_function", "call_method"):
        return modes
    target, args = node.target, node.args
    entered: Any = args[0] if args else None
    if target is compat.SET_GRAD:
        return replace(modes, grad=bool(entered))
    if target is compat.ENTER_AUTOCAST:
        kind, dtype, enabled = str(entered), args[1], args[2]
        cast = (kind, bool(enabled), dtype if isinstance(dtype, torch.dtype) else modes.cast(kind)[2])
        return replace(modes, casts=_with_cast(modes, cast))
    if target is compat.EXIT_AUTOCAST:
        return replace(modes, casts=_with_cast(modes, found[entered].cast(str(entered.args[0]))))
    if target is compat.ENTER_INFERENCE:
        return replace(modes, inference=bool(entered), grad=not entered)
    if target is compat.EXIT_INFERENCE:
        return replace(modes, inference=found[entered].inference, grad=found[entered].grad)
    name = str(getattr(target, "__name__", target))
    if name.endswith("increment_nesting"):
        return replace(modes, levels=(*modes.levels, node))
    if name.endswith("decrement_nesting"):
        return replace(modes, levels=modes.levels[:-1])
    return replace(modes, unknown=node) if _has_unknown_effect(node, name) else modes


def _with_cast(modes: Modes, cast: Cast) -> tuple[Cast, ...]:
    casts = {kind: (kind, enabled, dtype) for kind, enabled, dtype in modes.casts} | {cast[0]: cast}
    return tuple(sorted((c for c in casts.values() if c != _outer_cast(c[0])), key=str))


def _has_unknown_effect(node: Node, name: str) -> bool:
    """A call without a value, if it is neither a write nor a check: it must be there for something else."""
    nothing = fake_value(node) is None and all(fake_value(user) is None for user in node.users)
    return nothing and not name.startswith(_HARMLESS) and mutated_operand(node) is None


# checks, ranges of sizes, names in a profile or log, what saving for the backward may do, which kernel attention uses
_HARMLESS = (
    *("_assert", "_check", "sym_constrain", "_record_function", "lazy_load_decompositions"),
    *("_saved_tensors_hooks", "_sdpa_kernel", "_log_api_usage_once"),
)
