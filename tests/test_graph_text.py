"""Graphs as text: names of inputs, calls, shapes; the text is Python."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, GraphModule

from cggr_compile.graph_diff import diff_stages, find_stage
from cggr_compile.graph_text import dtype_text, graph_text, input_names, value_text


class Source:
    def __init__(self, name):
        self.name = name


def graph_of(*paths):
    graph = Graph()
    nodes = []
    for i, path in enumerate(paths):
        nodes.append(graph.placeholder(f"input_{i}"))
        nodes[-1]._dynamo_source = Source(path)
    graph.output(tuple(nodes))
    return graph


def parameter(*modules, name="weight"):
    return "L['self']" + "".join(f"._modules['{m}']" for m in modules) + f"._parameters['{name}']"


def test_names_of_inputs():
    graph = graph_of(
        parameter("model", "layers", "0", "self_attn", "q_proj"),
        parameter("model", "layers", "0", "mlp", "experts", "3", "gate"),
        parameter("transformer", "h", "11", "attn", "c_attn", name="bias"),
        parameter("model", "embed_tokens"),
        parameter("blocks", "2"),
        "L['input_ids']",
    )
    assert list(input_names(graph).values()) == [
        *("layers_0_q_proj_weight", "experts_3_gate_weight", "h_11_c_attn_bias", "embed_tokens_weight"),
        *("blocks_2_weight", "input_ids"),
    ]


def test_what_is_not_unique_keeps_its_whole_path():
    graph = graph_of(*(parameter("model", "layers", "0", part, "norm") for part in ("attn", "mlp")))
    assert list(input_names(graph).values()) == ["model_layers_0_attn_norm_weight", "model_layers_0_mlp_norm_weight"]


def test_calls():
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.empty(2, 3)
    y = graph.call_function(operator.add, (x, 1.5))
    y.meta["stack_trace"] = 'File "cggr_compile/passes", line 0, in select_rows\n    select_rows'
    z = graph.call_function(operator.getitem, (y, (slice(None, 1), ..., None)))
    w = graph.call_method("to", (z,), {"dtype": torch.bfloat16})
    graph.call_function(torch._C._nn.pad, (w, (0, 1)))
    v = graph.call_function(F.cross_entropy, (w, x), {"reduction": "none", "ignore_index": -100})
    u = graph.call_function(torch.ops.aten.view.default, (v, [1, -1]))
    graph.output((u,))
    text = graph_text(GraphModule(nn.Module(), graph))
    compile(text, "text", "exec")
    assert '    x: "f32[2, 3]",\n' in text
    assert "    add = x + 1.5  # <- select_rows\n" in text
    assert "    getitem = add[:1, ..., None]\n    to = getitem.to(dtype=torch.bfloat16)\n" in text
    assert "torch._C._nn.pad(to, (0, 1))" in text
    assert "F.cross_entropy(to, x, reduction='none', ignore_index=-100)" in text
    assert "aten.view.default(cross_entropy, [1, -1])" in text


def test_inner_graphs_are_shown():
    inner = Graph()
    inner.output(inner.call_method("sin", (inner.placeholder("q"),)))
    graph = Graph()
    root = nn.Module()
    root.body = GraphModule(nn.Module(), inner)
    graph.output(graph.call_module("body", (graph.placeholder("x"),)))
    text = graph_text(GraphModule(root, graph))
    assert "self.body(x)" in text and "def body(" in text and "q.sin()" in text


@pytest.mark.parametrize(
    ("dtype", "text"),
    [
        *(("float32", "f32"), ("bfloat16", "bf16"), ("int64", "i64"), ("uint8", "u8"), ("bool", "b8")),
        *(("float8_e4m3fn", "f8_e4m3fn"), ("complex64", "c64")),
    ],
)
def test_dtypes(dtype, text):
    assert dtype_text(getattr(torch, dtype)) == text
    assert value_text([torch.empty(0, 1, dtype=getattr(torch, dtype))]) == f"({text}[0, 1])"


def test_stages_by_name(tmp_path):
    for name, lines in (("00_captured", "# header 1\n\na\nb\n"), ("01_find_loss", "# header 2\n\na\nc\n")):
        (tmp_path / f"{name}.py").write_text(lines)
    assert find_stage(tmp_path / "01").name == find_stage(tmp_path / "find_loss").name == "01_find_loss.py"
    assert diff_stages(tmp_path / "00", tmp_path / "captured") == []
    assert diff_stages(tmp_path / "00", tmp_path / "01")[3:] == [" a", "-b", "+c"]
    for bad in ("0", "nothing", "../nowhere/00"):
        with pytest.raises(ValueError, match="stage must name one file"):
            find_stage(tmp_path / bad)
