"""Dynamo's names of inputs and modules."""

from __future__ import annotations

import torch

from cggr_compile import compat


def test_source_names():
    names = []

    def read(gm, inputs):
        names.extend(compat.source_name(node) for node in gm.graph.find_nodes(op="placeholder"))
        return gm.forward

    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.BatchNorm1d(2)])})
    extra = {"scale": torch.ones(2)}
    torch.compile(lambda x: model["layers"][0](x) * extra["scale"], backend=read)(torch.ones(3, 2))
    assert {"layers.0.weight", "layers.0.bias", "layers.0.running_mean"} <= set(names)
    assert "L['x']" in names and any("scale" in name for name in names)
    assert compat.source_name(torch.fx.Graph().placeholder("plain")) == "plain"


def test_module_at():
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(1, 1)])})
    scopes = {"L": {"self": model, "args": (model,), "kwargs": {"net": model}}, "G": {"net": model}}
    # a decorator of forward is the captured frame where it is compiled: the model is its first argument
    for head in ("L['self']", "L['args'][0]", "L['kwargs']['net']"):
        assert compat.module_at(f"{head}.layers.0", scopes) is model["layers"][0]
    assert compat.module_at("G['net']", scopes) is model
    for path in (
        "L['other']",
        "L['self'].layers.7",
        "nonsense",
        "L['self'].layers.0.weight",
        "L['args'][1]",
        "L['self'][0]",
    ):
        assert compat.module_at(path, scopes) is None


def test_beginnings_of_paths():
    model = torch.nn.ModuleDict({"inner": torch.nn.Linear(1, 1)})
    model.hidden = [torch.nn.Linear(1, 1)]
    scopes = {"L": {"step": {"models": (3, model)}}, "G": {}}
    root = "L['step']['models'][1]"
    for path in (f"{root}._modules['inner']._parameters['weight']", f"{root}.hidden[0]._parameters['weight']"):
        assert compat.outermost_module(path, scopes) == root
    assert compat.module_tree(f"{root}._modules['inner']._parameters['weight']") == root
    hidden = compat.module_tree(f"{root}.hidden[0]._parameters['weight']")
    assert compat.module_at(hidden, scopes) is model.hidden[0]
    for path in ("L['step']['models'][0]", "G['step']", "L['other'].x", "L['step'].models", "3"):
        assert compat.outermost_module(path, scopes) is None


def test_a_graph_holds_for_one_mode():
    seen = []

    def backend(gm, inputs):
        seen.append(compat.guard_mode("L['self']"))
        return gm.forward

    class Doubled(torch.nn.Module):  # which does not read its mode
        def forward(self, x):
            return x * 2

    model = Doubled()
    model.compile(backend=backend)
    for training in (True, False, True):
        model.train(training)(torch.ones(2))
    assert len(seen) == 2


def test_a_copy_has_the_sources():
    copies = []

    def copy(gm, inputs):
        graph, mapping = torch.fx.Graph(), {}
        for node in gm.graph.nodes:
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
        copied = torch.fx.GraphModule(gm, graph)
        compat.copy_sources(gm, copied, mapping)
        (place,) = graph.find_nodes(op="placeholder")
        copies.append((gm, copied, compat.source_name(place)))
        compat.without_source(place)
        copies.append(compat.source_path(place))
        return gm.forward

    torch.compile(lambda x: x + 1, backend=copy)(torch.ones(2))
    (gm, copied, name), path = copies
    assert name == "L['x']" and path is None
    assert vars(gm).get("_param_name_to_source") == vars(copied).get("_param_name_to_source")
