"""Whose step a compiled graph runs: models of one class share Dynamo's graphs, but not their runtimes."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule
from torch.nn import Module, Parameter

from cggr_compile import compat
from cggr_compile.call import Call
from cggr_compile.options import Options
from cggr_compile.recompute import call_of
from cggr_compile.registry import registry
from cggr_compile.report import GraphReport
from cggr_compile.runtime import Runtime


class RuntimeResolver:
    """Follows the calls of one captured graph to the model that each is for.

    Dynamo passes parameters in as arguments, so a second model of the same class, say of the next run of a sweep, runs
    the graph that the first one was captured with. Every call is for the module that was given to ``torch.compile``;
    where a function was, for the module whose trained parameters the graph takes: each is read off the stack. Without
    modules the model is the parameters. Where these are no ``nn.Parameter`` they may be other tensors in every step:
    such a graph stays with the runtime that it was captured for.

    It keeps no model's runtime alive, but that last one. To be made while Dynamo captures the graph.

    Args:
        inputs: the graph's arguments in this capture.
    """

    def __init__(self, gm: GraphModule, inputs: Sequence[Any]) -> None:
        self._code = compat.captured_code()
        self._paths, self._parts = _modules_read(gm, inputs)
        self._parameters = [i for i, v in enumerate(inputs) if isinstance(v, Parameter) and v.requires_grad]
        self._begun: list[tuple[GraphReport, Options]] = []
        self._begun_for: weakref.WeakSet[Runtime] = weakref.WeakSet()
        self._known: tuple[list[Any], Any] = ([], lambda: None)  # whom the last call was for, and the runtime
        self._here = threading.local()
        caller = compat.caller(None)  # the captured frame does not run yet
        self._functional = self._module(caller) is None
        found = self._of_tensors(inputs) if self._functional else self._of_module(caller)
        self._begun_for.add(found)
        self._kept = found if self._functional and not self._parameters else None
        self._capturing: Runtime | None = found

    @property
    def runtime(self) -> Runtime:
        """Of the model that this call, or at first the capture, is for."""
        if self._capturing is not None:
            return self._capturing
        call: Call = self._here.call
        return call.runtime

    @property
    def module(self) -> Module | None:
        """During the capture, the module that it is for."""
        return self._module(compat.caller(None))

    def begin(self, report: GraphReport, options: Options) -> None:
        """The graph has been rewritten for one ratio."""
        self._begun.append((report, options))
        self.runtime.begin(report, options)

    def end_capture(self) -> None:
        """From now on ``runtime`` is that of the call under way."""
        self._capturing = None

    def begin_call(self, args: Sequence[Any]) -> Call:
        """Look at whose call this is; ``end_call`` has to follow."""
        call = self._here.call = call_of(self._runtime_of(args))
        return call

    def end_call(self) -> None:
        del self._here.call

    def _runtime_of(self, args: Sequence[Any]) -> Runtime:
        if self._kept is not None:
            return self._kept
        caller = None if self._functional else compat.caller(self._code)
        module = None if caller is None else self._module(caller)
        key = [args[i] for i in self._parameters] if module is None else [module]
        known, runtime = self._known[0], self._known[1]()
        same = len(known) == len(key) and all(ref() is one for ref, one in zip(known, key, strict=True))
        if runtime is not None and same:
            return runtime  # type: ignore[no-any-return]
        found = self._of_tensors(args) if caller is None or module is None else self._of_module(caller)
        self._known = ([weakref.ref(one) for one in key], weakref.ref(found))
        if found not in self._begun_for:
            self._begun_for.add(found)
            for report, options in self._begun:
                found.begin(report, options)
        return found

    def _module(self, caller: compat.Caller) -> Module | None:
        if caller.module is not None or not self._paths:
            return caller.module
        module = compat.module_at(self._paths[0], caller.scopes)
        return None if module is None else compat.original_module(module)

    def _of_module(self, caller: compat.Caller) -> Runtime:
        module = self._module(caller)
        assert module is not None
        parts = [compat.module_at(path, caller.scopes) for path in self._parts]
        return registry.of_module(module, [part for part in parts if part is not None])

    def _of_tensors(self, args: Sequence[Any]) -> Runtime:
        return registry.of_tensors([t for t in args if isinstance(t, Tensor) and t.requires_grad])


def _modules_read(gm: GraphModule, inputs: Sequence[Any]) -> tuple[list[str], list[str]]:
    """Paths of the modules whose tensors a graph takes.

    Returns:
        the outermost modules, the one that trains the most first; and the roots of all module trees: a module may keep
        another one in a list, say, where it is no part of it.
    """
    scopes = compat.frame_scopes()
    taken: Counter[str] = Counter()
    trees: dict[str, None] = {}
    placeholders = gm.graph.find_nodes(op="placeholder")
    sources = [compat.source_path(node) for node in placeholders]
    for path, value in zip(sources, inputs, strict=True):
        outermost = None if path is None else compat.outermost_module(path, scopes)
        if path is not None and outermost is not None and isinstance(value, Tensor):
            taken[outermost] += 1 + len(inputs) * value.requires_grad
            trees[compat.module_tree(path)] = None
    if not any(sources):  # a piece that DDPOptimizer has cut out: what is left is which modules its operations are of
        stacks = (node.meta.get("nn_module_stack", {}).values() for node in gm.graph.nodes)
        taken.update(m for stack in stacks for path, _ in stack if (m := compat.outermost_module(path, scopes)))
    ranked = [path for path, _ in taken.most_common()]
    return ranked, [*ranked, *trees]
