"""Which runtime a model has: bound weakly to the module that was compiled, or to a functional model's tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter

from cggr_compile import compat
from cggr_compile.runtime import Runtime


class _Entry:
    """A runtime and what it is for.

    Attributes:
        claimed: whether something was compiled for it; before, it is only asked for.
        roots: the modules that were compiled. parts: others that their graphs call, and that are not inside of them.
    """

    def __init__(self) -> None:
        self.runtime = Runtime()
        self.claimed = False
        self.roots: Any = compat.weak_identity_dict()
        self.parts: Any = compat.weak_identity_dict()

    def claim(self, root: Module) -> None:
        self.claimed, self.roots[root] = True, None


class _Group:
    """Tensors that a functional model was seen with."""

    def __init__(self, entry: _Entry, tensors: Sequence[Tensor]) -> None:
        self.entry, self._size = entry, len(tensors)
        self.tensors: Any = compat.weak_tensor_dict()
        for tensor in tensors:
            self.tensors[tensor] = None

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether one model may have both: every trained tensor of the one is among the tensors of the other.

        Of a group that is mostly gone the rest says nothing: it may be what another model shares.
        """
        given = {id(tensor) for tensor in tensors}
        return all(t in self.tensors for t in tensors if t.requires_grad) or (
            2 * len(self.tensors) > self._size and all(id(t) in given for t in self.tensors if t.requires_grad)
        )


class Registry:
    """The runtimes of all models of the process.

    A module may ask for its runtime before anything is compiled. What is compiled first around it or inside of it
    takes that runtime over.
    """

    def __init__(self) -> None:
        self._modules: Any = compat.weak_identity_dict()
        self._groups: Any = compat.weak_tensor_dict()  # tensor: the groups that it is in
        self._lock = threading.RLock()

    # What compiled graphs ask.

    def of_module(self, module: Module, parts: Iterable[Module] = ()) -> Runtime:
        """The runtime of the module that is compiled, made if it has none.

        Args:
            parts: other modules that the graph calls.
        """
        with self._lock:
            entry: _Entry | None = self._modules.get(module)
            if entry is None:
                asked = _distinct(self._asked_for(module))
                entry = self._modules[module] = asked[0] if len(asked) == 1 else _Entry()
            entry.claim(module)
            for part in parts:
                if not _contains(module, part):
                    entry.parts[part] = None
            return entry.runtime

    def of_tensors(self, tensors: Sequence[Tensor]) -> Runtime:
        """The runtime of the functional model that has these tensors as differentiable inputs."""
        with self._lock:
            candidates = (self._modules_with(tensors), self._groups_with(tensors))
            entry = next((found[0] for found in candidates if len(found) == 1), None) or self._bind(tensors)
            entry.claimed = True
            return entry.runtime

    # What users ask.

    def find_module(self, module: Module) -> Runtime:
        """The runtime that trains a module: its own, or the only one inside of it, or the only one around it.

        Raises:
            ValueError: if several have equal claims, or the module has no parameter and none of these.
        """
        module = compat.original_module(module)
        with self._lock:
            own: _Entry | None = self._modules.get(module)
            if own is not None and module in own.roots:
                return own.runtime
            inside = self._inside(module)
            entry = _outermost(inside)
            if entry is None and inside:
                names = {id(m): name for name, m in module.named_modules()}
                found = sorted(names[id(m)] for m, _ in inside)
                raise ValueError(f"model has several parts that are compiled by themselves, ask for one: {found}")
            if entry is None:
                around = self._around(module)
                entry = _innermost(around)
                if entry is None and around and own is None:
                    found = sorted(type(m).__name__ for m, _ in around)
                    raise ValueError(f"model is a part of several compiled models, ask for one of these: {found}")
            entry = entry or own
            if entry is None:
                if not any(True for _ in module.parameters()):
                    raise ValueError("model must have at least one parameter")
                asked = _distinct(e for g in self._groups_of(module) if not (e := g.entry).claimed)
                entry = self._modules[module] = asked[0] if len(asked) == 1 else _Entry()
            return entry.runtime

    def find_tensors(self, tensors: Sequence[Tensor]) -> Runtime:
        """The runtime of the model with these parameters.

        Raises:
            ValueError: if several have them.
        """
        with self._lock:
            entries = self._modules_with(tensors) or self._groups_with(tensors)
            if len(entries) > 1:
                raise ValueError("several compiled models have the parameters given as model: give the module")
            return (entries[0] if entries else self._bind(tensors)).runtime

    @contextmanager
    def replaced(self, module: Module) -> Iterator[Runtime]:
        """A runtime for what is compiled meanwhile around ``module``; afterwards all is as it was."""
        module = compat.original_module(module)
        with self._lock:
            before, entry = self._modules.get(module), _Entry()
            entry.claim(module)
            self._modules[module] = entry
        try:
            yield entry.runtime
        finally:
            with self._lock:
                if before is None:
                    del self._modules[module]
                else:
                    self._modules[module] = before

    def inside(self, module: Module) -> list[Runtime]:
        """The runtimes of what is inside a module."""
        with self._lock:
            return [entry.runtime for entry in _distinct(entry for _, entry in self._inside(module))]

    def _asked_for(self, module: Module) -> Iterator[_Entry]:
        """What was asked for before, of something that is inside a module or around it."""
        for _, entry in (*self._inside(module), *self._around(module)):
            if not entry.claimed:
                yield entry
        for group in self._groups_of(module):
            if not group.entry.claimed:
                yield group.entry

    def _inside(self, module: Module) -> list[tuple[Module, _Entry]]:
        return [(m, self._modules[m]) for m in module.modules() if m is not module and m in self._modules]

    def _around(self, module: Module) -> list[tuple[Module, _Entry]]:
        """Modules with a runtime that contain ``module``, or call it."""
        return [
            (m, entry)
            for m, entry in list(self._modules.items())
            if m is not module and any(_contains(one, module) for one in (m, *entry.parts))
        ]

    def _groups_of(self, module: Module) -> list[_Group]:
        """Groups all of whose tensors are parameters of a module."""
        own = {id(p) for p in module.parameters()}
        groups = {id(g): g for p in module.parameters() for g in self._groups.get(p, ())}
        return [g for g in groups.values() if all(id(t) in own for t in g.tensors)]

    def _modules_with(self, tensors: Sequence[Tensor]) -> list[_Entry]:
        """The entry of the innermost module that has all these parameters, or of several if none is inside the others.

        What is no parameter does not count, unless there is nothing else.
        """
        given = {id(t) for t in tensors if isinstance(t, Parameter)} or {id(t) for t in tensors}
        if not given:
            return []
        found = [(m, entry) for m, entry in list(self._modules.items()) if given <= {id(p) for p in m.parameters()}]
        innermost = _innermost(found)
        return _distinct(entry for _, entry in found) if innermost is None else [innermost]

    def _groups_with(self, tensors: Sequence[Tensor]) -> list[_Entry]:
        groups = {id(g): g for t in tensors for g in self._groups.get(t, ())}
        return _distinct(g.entry for g in groups.values() if g.fits(tensors))

    def _bind(self, tensors: Sequence[Tensor]) -> _Entry:
        entry = _Entry()
        group = _Group(entry, tensors)
        for tensor in tensors:
            self._groups.setdefault(tensor, []).append(group)
        return entry


def _contains(module: Module, part: Module) -> bool:
    return any(m is part for m in module.modules())


def _distinct(entries: Iterable[_Entry]) -> list[_Entry]:
    return list({id(entry): entry for entry in entries}.values())


def _outermost(found: Sequence[tuple[Module, _Entry]]) -> _Entry | None:
    """The entry of the module that has all the others inside of it, or that they all share."""
    return _first(found, _contains)


def _innermost(found: Sequence[tuple[Module, _Entry]]) -> _Entry | None:
    """The entry of the module that is inside all the others, or that they all share."""
    return _first(found, lambda module, other: _contains(other, module))


def _first(found: Sequence[tuple[Module, _Entry]], before: Callable[[Module, Module], bool]) -> _Entry | None:
    if len(_distinct(entry for _, entry in found)) == 1:
        return found[0][1]
    return next((entry for module, entry in found if all(before(module, other) for other, _ in found)), None)


registry = Registry()


def runtime(model: Module | Mapping[str, Tensor] | Iterable[Tensor]) -> Runtime:
    """The runtime of a model compiled with ``backend="cggr"``. It lasts as long as the model.

    It is bound to the module that is compiled, in whatever way: parameters may be replaced, shared and sharded. A part
    of that module, and what is wrapped around it (DDP, PEFT, the result of ``torch.compile``), have the same one. Two
    compiled models never share one, and a deep copy has its own.

    Args:
        model: the module; for a functional model its parameters, as a mapping or an iterable.

    Raises:
        ValueError: if there are no parameters in it; if it contains, or is contained in, several compiled models.
    """
    if isinstance(model, Module):
        return registry.find_module(model)
    tensors: list[Tensor]
    if isinstance(model, Mapping):
        tensors = list(model.values())
    elif isinstance(model, Iterable) and not isinstance(model, (str, Tensor)):
        tensors = list(model)
    else:
        raise ValueError(f"model must be a module or its parameters, got {type(model).__name__}")
    if not tensors or not all(isinstance(p, Tensor) for p in tensors):
        raise ValueError("model must have at least one parameter")
    return registry.find_tensors(tensors)
