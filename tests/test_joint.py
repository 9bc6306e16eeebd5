"""The joint-graph hook: identity for Inductor's caches, and passes that the user had set."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import uuid

import models
import pytest
import torch

from cggr_compile import compat, joint
from cggr_compile.graph_dump import GraphDump
from cggr_compile.options import Options
from cggr_compile.report import GraphReport


def hook(**options):
    report = GraphReport(0, True, "Inductor CPU", Options(**options).as_dict())
    return joint.joint_pre_pass(Options(**options), report, GraphDump(None, report))


def test_uuid_changes_with_options_and_sources(monkeypatch):
    assert hook().uuid() == hook().uuid()
    assert hook().uuid() != hook(kv_gradient="stop").uuid()
    before = hook().uuid()
    monkeypatch.setattr(joint, "source_digest", lambda: "edited")
    assert hook().uuid() != before


def test_source_digest_covers_passes_and_operators():
    covered = {p.name for p in joint.sources()}
    assert {"resolve_markers.py", "detach_unselected.py", "options.py"} <= covered


def test_unkeyed_user_pass_turns_caching_off():
    with torch._inductor.config.patch(joint_custom_pre_pass=lambda graph: None):
        assert hook().uuid() is None


def test_graphs_inside_the_joint_graph_are_no_joint_graphs():
    """Inductor runs the hook over the score and mask functions of FlexAttention too."""
    report = GraphReport(0, True, "Inductor CPU", Options().as_dict())
    joint.joint_pre_pass(Options(), report, GraphDump(None, report))(torch.fx.symbolic_trace(lambda x: x.sin()).graph)
    assert not report.passes


@pytest.mark.slow
def test_user_pass_still_runs():
    seen = []
    with torch._inductor.config.patch(joint_custom_pre_pass=lambda graph: seen.append(len(graph.nodes))):
        models.compiled(models.Decoder(), compiler="inductor", fallback="silent")
        model = models.family("llama", num_hidden_layers=1)
        models.compiled(model, compiler="inductor", scoring="random")
        model(**models.make_batch()).loss.backward()
    assert seen


@pytest.mark.slow
def test_cache_hits_across_processes_and_misses_on_options():
    program = textwrap.dedent("""
        import sys, torch, models
        from torch._dynamo.utils import counters
        from cggr_compile import joint
        joint.source_digest = lambda: sys.argv[2]
        model = models.family("llama", num_hidden_layers=1)
        models.compiled(model, compiler="inductor", scoring="random", kv_gradient=sys.argv[1])
        model(**models.make_batch()).loss.backward()
        print("HITS", counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_miss"])
    """)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (os.path.dirname(__file__), *sys.path)))}
    key = uuid.uuid4().hex  # never seen by the cache, whose compiled C++ header stays in use

    def run(kv_gradient: str) -> list[int]:
        command = [sys.executable, "-c", program, kv_gradient, key]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        line = next(line for line in done.stdout.splitlines() if line.startswith("HITS"))
        return [int(n) for n in line.split()[1:]]

    assert run("stop") == [0, 1]
    assert run("stop") == [1, 0]
    assert run("project") == [0, 1]


@pytest.mark.parametrize(("family", "known"), [("mixtral", True), ("llama", False)])
def test_a_dense_graph_with_our_operators_is_keyed_by_our_sources(monkeypatch, family, known):
    """Lowered experts are in the graph at ratio 1.0 too."""
    keys = []

    def compile_fx(gm, inputs, patches):
        keys.append("joint_custom_pre_pass" in patches and patches["joint_custom_pre_pass"].uuid())
        return gm.forward

    monkeypatch.setattr(compat, "compile_fx", compile_fx)
    model = models.compiled(models.family(family, num_hidden_layers=1), compiler="inductor", min_tokens_ratio=1.0)
    model(**models.make_batch())
    assert keys == [(joint.source_digest(),) if known else False]
