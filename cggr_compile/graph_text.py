"""A graph as Python that people read: an argument a line, short names, shapes and dtypes, our nodes marked."""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from cggr_compile import compat
from cggr_compile.passes.nodes import fake_value

WIDTH = 110  # of a call that stays on one line
_INFIX = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.truediv: "/",
    operator.floordiv: "//",
    operator.mod: "%",
    operator.pow: "**",
    operator.matmul: "@",
    operator.and_: "&",
    operator.or_: "|",
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
}
_FRAME = re.compile(r'File "([^"]*)", line (\d+), in ([^\n]*)\n\s*([^\n]*)')


def graph_text(module: GraphModule, names: Mapping[str, str] | None = None) -> str:
    """The source text of a graph, and of those inside it (bodies of checkpoints, score functions).

    A comment stands behind an input with its whole path, behind a node of ours with the pass that made it, and in front
    of the user's nodes with the line of code that they come from.

    Args:
        names: other names of inputs, by those of their nodes.
    """
    texts = [_function(module.graph, "forward", names)]
    for name, child in module.named_modules():
        if isinstance(child, GraphModule) and child is not module:
            texts.append(_function(child.graph, name.replace(".", "_"), None))
    return "\n\n\n".join(texts) + "\n"


def input_names(graph: Graph) -> dict[str, str]:
    """Short names of a Dynamo graph's inputs, by those of their nodes: ``layers_0_q_proj_weight``.

    A path keeps its last index, what is indexed, and its last two names; the whole of it where that is not unique.
    """
    placeholders = list(graph.find_nodes(op="placeholder"))
    paths = {str(node): compat.source_name(node) for node in placeholders}
    short = {name: _short_path(path) for name, path in paths.items()}
    again = Counter(short.values())
    taken, found = {str(node) for node in graph.nodes} - set(paths), {}
    for name, path in paths.items():
        candidates = (short[name] if again[short[name]] == 1 else "", _identifier(path), name)
        found[name] = next((one for one in candidates if one and one not in taken), name)
        taken.add(found[name])
    return found


def pass_of(node: Node) -> str:
    """The pass of ours that made a node; empty for the user's."""
    frame = _frame(node)
    return frame[2] if frame is not None and frame[0] == "cggr_compile/passes" else ""


def node_line(node: Node, names: Mapping[str, str]) -> str:
    """One node as an assignment, on one line."""
    return _assignment(node, names, "", width=None)


def value_text(value: Any) -> str:
    """``f32[2, 16, 32]`` for a tensor, ``(f32[2], i64[2])`` for several; empty for what is none."""
    if isinstance(value, Tensor):
        return f"{dtype_text(value.dtype)}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, (tuple, list)) and value and all(isinstance(each, Tensor) for each in value):
        return f"({', '.join(map(value_text, value))})"
    return "Sym" if isinstance(value, torch.SymInt) else ""


def dtype_text(dtype: torch.dtype) -> str:
    """``f32``, ``bf16``, ``i64``, ``b8``."""
    name = str(dtype).removeprefix("torch.")
    if name == "bool":
        return "b8"
    for long, short in (("bfloat", "bf"), ("float", "f"), ("uint", "u"), ("int", "i"), ("complex", "c")):
        if name.startswith(long):
            return short + name.removeprefix(long)
    return name


def _function(graph: Graph, title: str, names: Mapping[str, str] | None) -> str:
    names = {**input_names(graph), **(names or {})}
    placeholders = list(graph.find_nodes(op="placeholder"))
    lines = [f"def {_identifier(title)}("]
    for node in placeholders:
        shape, path = value_text(fake_value(node)), pass_of(node) or compat.source_name(node)
        name = names[str(node)]
        comment = f"  # {path}" if path != name else ""
        lines.append(f"    {name}" + (f': "{shape}"' if shape else "") + f",{comment}")
    lines.append("):" if placeholders else lines.pop() + "):")
    said: tuple[str, ...] | None = None
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        frame = _frame(node) if node.op != "output" else None
        if frame is not None and not pass_of(node) and frame != said:
            lines.append(f"    # {frame[0].rsplit('/', 1)[-1]}:{frame[1]}  {frame[3]}")
            said = frame
        lines.append(_assignment(node, names, "    "))
    return "\n".join(lines)


def _assignment(node: Node, names: Mapping[str, str], indent: str, width: int | None = WIDTH) -> str:
    if node.op == "output":
        results = node.args[0]
        if not isinstance(results, (tuple, list)):
            return f"{indent}return {_text(results, names)}"
        inner = "".join(f"{indent}    {_text(each, names)},\n" for each in results)
        return f"{indent}return (\n{inner}{indent})"
    shape = value_text(fake_value(node))
    begin = f"{indent}{_name(node, names)}" + (f': "{shape}"' if shape else "") + " = "
    ours = f"  # <- {made_by}" if (made_by := pass_of(node)) else ""
    function, arguments = _call(node, names)
    if arguments is None:
        return begin + function + ours
    line = f"{begin}{function}({', '.join(arguments)})"
    if width is None or len(line) <= width or not arguments:
        return line + ours
    inner = "".join(f"{indent}    {argument},\n" for argument in arguments)
    return f"{begin}{function}({ours}\n{inner}{indent})"


def _call(node: Node, names: Mapping[str, str]) -> tuple[str, list[str] | None]:
    """What is called, and with which arguments; None: that is the whole expression."""
    args = [_text(arg, names) for arg in node.args]
    arguments = args + [f"{key}={_text(value, names)}" for key, value in node.kwargs.items()]
    if node.op == "get_attr":
        return f"self.{node.target}", None
    if node.op == "call_module":
        return f"self.{node.target}", arguments
    if node.op == "call_method":
        return f"{args[0]}.{node.target}", arguments[1:]
    if node.target in _INFIX and len(args) == 2:
        return f" {_INFIX[node.target]} ".join(args), None
    if node.target is operator.getitem:
        index = node.args[1]
        parts = index if isinstance(index, tuple) and index else (index,)
        return f"{args[0]}[{', '.join(_index(part, names) for part in parts)}]", None
    return _function_name(node.target), arguments


def _index(part: Any, names: Mapping[str, str]) -> str:
    if not isinstance(part, slice):
        return _text(part, names)
    ends = ["" if end is None else _text(end, names) for end in (part.start, part.stop)]
    return ":".join(ends + ([] if part.step is None else [_text(part.step, names)]))


def _function_name(target: Any) -> str:
    if isinstance(target, compat.OpOverload):
        return str(target)  # aten.mul.Tensor
    name = getattr(target, "__name__", type(target).__name__)
    for prefix, module in (("torch", torch), ("F", F)):
        if getattr(module, name, None) is target:
            return f"{prefix}.{name}"
    home = getattr(target, "__module__", None) or ""
    return re.sub(r"[^\w.]+", "_", f"{home}.{name}".strip("."))


def _text(value: Any, names: Mapping[str, str]) -> str:
    if isinstance(value, Node):
        return _name(value, names)
    if isinstance(value, (tuple, list)):
        inner = ", ".join(_text(each, names) for each in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_text(each, names)}" for key, each in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({', '.join(_text(end, names) for end in (value.start, value.stop, value.step))})"
    if value is Ellipsis:
        return "..."
    text = repr(value)
    return repr(text) if "<" in text or "\n" in text else text


def _name(node: Node, names: Mapping[str, str]) -> str:
    return names.get(str(node), str(node))


def _frame(node: Node) -> tuple[str, str, str, str] | None:
    """File, line, function and code of the innermost frame of what made a node."""
    frames: Iterable[tuple[str, str, str, str]] = _FRAME.findall(node.meta.get("stack_trace") or "")
    *_, last = (None, *frames)
    return last


def _short_path(path: str) -> str:
    """``model.layers.0.self_attn.q_proj.weight``: ``layers_0_q_proj_weight``."""
    expression = re.fullmatch(r"[LG](\['[^']+'\])+", path)
    parts = re.findall(r"'([^']+)'", path)[-1:] if expression else path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    begin = max(numbers[-1] - 1, 0) if numbers else len(parts)
    end = max(len(parts) - 2, numbers[-1] + 1 if numbers else 0)
    return _identifier(".".join(parts[begin : begin + 2] + parts[end:]))


def _identifier(path: str) -> str:
    name = re.sub(r"\W+", "_", path).strip("_")
    return f"_{name}" if not name or name[0].isdigit() else name
