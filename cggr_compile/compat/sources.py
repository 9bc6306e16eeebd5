"""Dynamo's names of graph inputs and modules: paths from the captured frame's variables."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node


def source_name(placeholder: Node) -> str:
    """What the user calls a graph input: ``model.layers.0.mlp.up_proj.weight``, or the expression Dynamo has for it."""
    name = source_path(placeholder)
    if name is None:
        return str(placeholder)
    parts = re.findall(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", name)
    return ".".join(parts) or name


def source_path(placeholder: Node) -> str | None:
    """The expression that Dynamo has for a graph input: ``L['self']._modules['head']._parameters['weight']``."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return None
    return str(source.name() if callable(source.name) else source.name)  # a method before 2.13


def copy_sources(gm: GraphModule, copied: GraphModule, copies: Mapping[Node, Node]) -> None:
    """Give a copy of a Dynamo graph what AOTAutograd reads of inputs and parameters. ``copies``: of each node."""
    for node, other in copies.items():
        if hasattr(node, "_dynamo_source"):
            other._dynamo_source = node._dynamo_source
    if hasattr(gm, "_param_name_to_source"):
        copied._param_name_to_source = gm._param_name_to_source


def without_source(placeholder: Node) -> None:
    """Make AOTAutograd take an input of a Dynamo graph that is no variable of the user's."""
    placeholder._dynamo_source = None


def module_tree(path: str) -> str:
    """The beginning of a :func:`source_path` that leads to the root of the module tree which the tensor is in."""
    return re.sub(r"(\._(?:modules|parameters|buffers)\['[^']+'\])+$", "", path)


def module_at(path: str, scopes: dict[str, dict[str, Any]]) -> torch.nn.Module | None:
    """The module that an ``nn_module_stack`` path names: ``L['self'].model.layers.0``, ``L['args'][0].model``."""
    *_, (_, value) = (None, None), *_along(path, scopes)
    return value if isinstance(value, torch.nn.Module) else None


def outermost_module(path: str, scopes: dict[str, dict[str, Any]]) -> str | None:
    """The shortest beginning of a path (as of :func:`module_at`, or of a source) that is a module's."""
    return next((begin for begin, value in _along(path, scopes) if isinstance(value, torch.nn.Module)), None)


def guard_mode(path: str) -> None:
    """Let the graph under capture hold for the present mode (train or eval) of the module at ``path`` only.

    Dynamo itself guards the mode of modules that read it, such as a dropout. ``path``: as of :func:`module_at`.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import AttrSource, GetItemSource, GlobalSource, LocalSource, Source

    head, steps = _parsed(path)
    assert head is not None
    source: Source = LocalSource(head[1]) if head[0] == "L" else GlobalSource(head[1])
    for _, index, key, name in steps:
        source = AttrSource(source, name) if name else GetItemSource(source, int(index) if index else key)
    install_guard(AttrSource(source, "training").make_guard(GuardBuilder.CONSTANT_MATCH))


def _along(path: str, scopes: dict[str, dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Every beginning of a path with its value; the whole path with None if it leads nowhere."""
    head, steps = _parsed(path)
    if head is None or head[0] not in scopes:
        return
    value: Any = scopes[head[0]].get(head[1])
    yield f"{head[0]}['{head[1]}']", value
    for end, index, key, name in steps:
        try:
            value = getattr(value, name) if name else value[int(index) if index else key]
        except (AttributeError, LookupError, TypeError):
            yield path, None
            return
        yield path[:end], value


@functools.lru_cache(maxsize=1024)
def _parsed(path: str) -> tuple[tuple[str, str] | None, list[tuple[int, str, str, str]]]:
    """The variable that a path begins with, and its steps: where each ends, its index, key or name."""
    head = re.match(r"([LG])\['([^']+)'\]", path)
    if head is None:
        return None, []
    steps = re.compile(r"\[(\d+)\]|\['([^']+)'\]|([^.\[\]]+)").finditer(path, head.end())
    return (head[1], head[2]), [(step.end(), step[1], step[2], step[3]) for step in steps]
