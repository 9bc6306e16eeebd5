"""Finds why a training graph lacks the loss or the layers: looks for the evidence of each cause, in a fixed order."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from traceback import FrameSummary
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Graph

from cggr_compile import compat
from cggr_compile.causes import Cause
from cggr_compile.passes.nodes import fake_value, op_name, shape_of

if TYPE_CHECKING:
    from torch.fx import Node

Found = tuple[Cause, str] | None
# Refusals that say what a graph lacks, not why.
LACKING = frozenset({Cause.NO_LOSS, Cause.NO_HEAD, Cause.UNSUPPORTED_STACK, Cause.UNKNOWN_MODE})
_TORCH = Path(torch.__file__).parent
_LOSSES = (
    *("log_softmax", "logsumexp", "nll_loss", "kl_div", "binary_cross_entropy", "binary_cross_entropy_with_logits"),
    *("linear_cross_entropy", "autograd_function_apply"),  # F's own, and one of the user's
)
_ATTENTIONS = ("scaled_dot_product_attention", "flex_attention", "softmax", "multi_head_attention_forward")


def find_cause(graph: Graph, lacking: Cause | None) -> Found:
    """The cause of what a training graph lacks, and its text; None without evidence of one.

    To be called while Dynamo captures the graph: most of the evidence is on the stack of Python's frames.

    Args:
        lacking: why the graph is refused; one that is not ``LACKING`` something has no further cause.
    """
    if lacking not in LACKING:
        return None
    scene = _Scene.here(graph)
    finders = _OF_PIECES if lacking is not Cause.NO_LOSS else (*_OF_PIECES, *_OF_LOSSES)
    return next((found for finder in finders if (found := finder(scene)) is not None), None)


def break_ahead() -> tuple[compat.GraphBreak | None, list[torch.nn.Module]]:
    """The graph break that ends the graph under capture, if one does, and the modules whose methods run."""
    scene = _Scene.here(Graph())
    return scene.graph_break() if compat.break_at_end() else None, scene.modules


def at_compiled_call() -> bool:
    """Whether the graph under capture begins where the compiled function does, in a call of it by the user."""
    return not _Scene.here(Graph()).users


@dataclass(frozen=True)
class _Scene:
    """What there is to look at.

    Attributes:
        inside: the frames that called the captured one, innermost first, to the compiled call (inclusive); they exist
            where Dynamo runs a part of the compiled function as plain Python.
        outside: the frames that led to the compiled call.
        scope: locals of the captured frame.
    """

    graph: Graph
    inside: tuple[FrameType, ...]
    outside: tuple[FrameType, ...]
    scope: Mapping[str, Any]

    @staticmethod
    def here(graph: Graph) -> _Scene:
        frame = compat.below_dynamo(sys._getframe())
        frames = []
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        end = next((i + 1 for i, frame in enumerate(frames) if compat.is_compiled_call(frame)), 0)
        return _Scene(graph, tuple(frames[:end]), tuple(frames[end:]), compat.frame_scopes().get("L", {}))

    @property
    def scopes(self) -> Iterator[Mapping[str, Any]]:
        """Locals of the captured frame, and of those up to the compiled call."""
        yield self.scope
        for frame in self.inside:
            yield frame.f_locals

    @property
    def modules(self) -> list[torch.nn.Module]:
        """Those whose methods run, innermost first, and those that they were called with."""
        found = []
        for scope in self.scopes:
            arguments = scope.get("args", ())
            values = (scope.get("self"), *(arguments if isinstance(arguments, tuple) else ()), *scope.values())
            found += [value for value in values if isinstance(value, torch.nn.Module)]
        return list(dict.fromkeys(found))

    @property
    def users(self) -> list[FrameType]:
        """Frames up to the compiled call that are not PyTorch's own."""
        return [frame for frame in self.inside if not _is_torch(frame.f_code.co_filename)]

    def graph_break(self) -> compat.GraphBreak | None:
        """The break that made a piece of this graph: at its end, where it resumes, or in a function that calls it."""
        at_end, code = compat.break_at_end(), compat.captured_code()
        places = [(frame.f_code.co_filename, frame.f_lineno) for frame in self.users]
        if code is not None and (line := compat.resumed_at(code)) is not None:
            places.insert(0, (code.co_filename, line))
        if at_end is not None:
            places.insert(0, (at_end.stack[-1].filename, at_end.stack[-1].lineno or 0))
        known = compat.graph_breaks()
        for place in places:
            for found in known:
                if any((frame.filename, frame.lineno) == place for frame in found.stack):
                    return found
        return at_end


def _is_torch(file: str) -> bool:
    return Path(file).is_relative_to(_TORCH)


# Causes that cut the graph into pieces.


def _fused_head(scene: _Scene) -> Found:
    for scope in scene.scopes:
        keywords = scope.get("kwargs")
        given = keywords.get("fused_lm_head") if isinstance(keywords, dict) else None
        if scope.get("fused_lm_head", given) is True:
            return Cause.FUSED_HEAD, Cause.FUSED_HEAD.says()
    return None


def _fsdp(scene: _Scene) -> Found:
    if "torch.distributed.fsdp" not in sys.modules:
        return None
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    kinds: Any = (FSDPModule, FullyShardedDataParallel)
    running = [frame.f_locals.get("self") for frame in (*scene.inside, *scene.outside)]
    wrapped = [module for module in (*scene.modules, *running) if isinstance(module, kinds)]
    inner = {m for outer in wrapped for m in outer.modules() if m is not outer and isinstance(m, kinds)}
    return (Cause.FSDP_BLOCKS, Cause.FSDP_BLOCKS.says(count=len(inner))) if inner else None


def _expert_parallel(scene: _Scene) -> Found:
    parts = (part for module in scene.modules for part in module.modules())
    if any(getattr(part, "_is_expert_parallel", False) is True for part in parts):  # transformers says so
        return Cause.EXPERT_PARALLEL, Cause.EXPERT_PARALLEL.says()
    return None


def _broken(scene: _Scene) -> Found:
    found = scene.graph_break()
    if found is None:
        return None
    files = [Path(frame.filename).as_posix() for frame in found.stack]
    functions = {frame.name for frame in found.stack}
    end = next((frame for frame in reversed(found.stack) if not _is_torch(frame.filename)), found.stack[-1])
    where = _place(end)
    if "make_inputs_require_grads" in functions:
        return Cause.INPUT_GRADS_HOOK, Cause.INPUT_GRADS_HOOK.says(where=where)
    if any("flash_attention" in file for file in files) or (
        _in(files[-1], "transformers") and _uses_flash_attention(scene)
    ):
        return Cause.FLASH_ATTENTION, Cause.FLASH_ATTENTION.says(where=where)
    if any(file.endswith("transformers/integrations/moe.py") for file in files[:-1]):
        return Cause.EXPERTS_LOOP, Cause.EXPERTS_LOOP.says(where=where)
    if any(file.endswith("transformers/utils/output_capturing.py") for file in (*files[-1:], end.filename)):
        return Cause.OUTPUT_HOOKS, Cause.OUTPUT_HOOKS.says(where=where)
    if _in(end.filename, "transformers") and end.name == "loss_function":
        return Cause.LOSS_TYPE, Cause.LOSS_TYPE.says(where=where)
    if _in(end.filename, "transformers") and any(map(_caches_under_checkpoints, scene.modules)):
        return Cause.CACHE_WARNING, Cause.CACHE_WARNING.says(where=where)
    why = found.reason.strip().partition("\n")[0]
    return Cause.GRAPH_BREAK, Cause.GRAPH_BREAK.says(where=where, why=why, or_else=_settings(found))


def _settings(found: compat.GraphBreak) -> str:
    """What of Dynamo's settings may help: the one that its message names; in a called function, nested breaks.

    Otherwise a break ends the graphs of all callers; with nested ones the next graph goes on in the callers.
    """
    ways = [f"keep it in the graph by torch._dynamo.config.{found.setting} = True"] if found.setting else []
    called = sum(not _is_torch(frame.filename) for frame in found.stack) > 1
    if called and not compat.nested_graph_breaks():
        ways.append(
            "let one graph reach from behind it to the loss by torch._dynamo.config.nested_graph_breaks = True, which "
            "no function with a try or with block around the break allows"
        )
    return "".join(f", or {way}" for way in ways)


def _plain_python(scene: _Scene) -> Found:
    users = scene.users
    if not users:
        return None
    code = users[0].f_code
    where = _place(FrameSummary(code.co_filename, users[0].f_lineno, code.co_name, lookup_line=False))
    return Cause.PLAIN_PYTHON, Cause.PLAIN_PYTHON.says(where=where)


def _in(file: str, package: str) -> bool:
    return package in Path(file).parts


def _place(frame: FrameSummary) -> str:
    """``transformers/modeling_utils.py:2154, in hook``: file (without the folder of installed packages) and line."""
    file = Path(frame.filename).as_posix().rpartition("site-packages/")[2]
    return f"{file}:{frame.lineno}, in {frame.name}"


def _uses_flash_attention(scene: _Scene) -> bool:
    configs = [getattr(module, "config", None) for module in scene.modules]
    return any(getattr(config, "_attn_implementation", None) == "flash_attention_2" for config in configs)


def _caches_under_checkpoints(module: torch.nn.Module) -> bool:
    checkpoints = any(getattr(part, "gradient_checkpointing", False) is True for part in module.modules())
    return checkpoints and getattr(getattr(module, "config", None), "use_cache", False) is True


# Causes of a whole graph that has no loss.


def _other_loss(scene: _Scene) -> Found:
    for node in reversed(scene.graph.nodes):
        if node.op.startswith("call_") and op_name(node) in _LOSSES and not _per_head(node):
            return _unsupported(f"{op_name(node)!r} ({node}) in place of it")
    return None


def _per_head(node: Node) -> bool:
    """Whether a call works on scores of attention, [B, heads, S, S], and not on logits."""
    return len(shape_of(node)) == 4


def _one_block(scene: _Scene) -> Found:
    graph = scene.graph
    names = {op_name(node) for node in graph.nodes}
    if "embedding" in names or not names & {*_ATTENTIONS, "linear", "tag_activation_checkpoint"}:
        return None
    hidden = {shape_of(n) for n in graph.find_nodes(op="placeholder") if _is_activation(n) and len(shape_of(n)) == 3}
    results = [n for n in graph.output_node().all_input_nodes if _has_gradient(n)]
    if not results or not all(shape_of(n) in hidden for n in results):
        return None
    return Cause.ONE_BLOCK, Cause.ONE_BLOCK.says()


def _label_smoother(scene: _Scene) -> Found:
    for frame in scene.outside:
        trainer: Any = frame.f_locals.get("self")
        if frame.f_code.co_name == "compute_loss" and getattr(trainer, "label_smoother", None) is not None:
            factor = getattr(trainer.label_smoother, "epsilon", "E")
            return Cause.LABEL_SMOOTHER, Cause.LABEL_SMOOTHER.says(factor=factor)
    return None


def _loss_outside(scene: _Scene) -> Found:
    results = [node for node in scene.graph.output_node().all_input_nodes if _has_gradient(node)]
    losses = [node for node in results if shape_of(node) == ()]
    if losses:
        return _unsupported(f"one that is no cross-entropy (it ends in {op_name(losses[0])!r})")
    if not results:
        return None
    listed = ", ".join(f"{op_name(node)} {list(shape_of(node))}" for node in results[:3])
    return Cause.LOSS_OUTSIDE, Cause.LOSS_OUTSIDE.says(what=listed)


def _unsupported(what: str) -> Found:
    return Cause.UNSUPPORTED_LOSS, Cause.UNSUPPORTED_LOSS.says(what=what)


def _is_activation(node: Node) -> bool:
    value = fake_value(node)
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return floating and not isinstance(value, torch.nn.Parameter)


def _has_gradient(node: Node) -> bool:
    value = fake_value(node)
    return isinstance(value, torch.Tensor) and value.requires_grad


# The first that finds its evidence names the cause.
_OF_PIECES: tuple[Callable[[_Scene], Found], ...] = (_fused_head, _fsdp, _expert_parallel, _broken, _plain_python)
_OF_LOSSES: tuple[Callable[[_Scene], Found], ...] = (_other_loss, _label_smoother, _one_block, _loss_outside)
