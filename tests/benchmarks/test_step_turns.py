"""Arms of the step benchmark in processes of their own: they compile without weights, and get them in their turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

import arms
import results
import step
import step_turns
from shapes import SHAPES, build_model, make_batch


class CalledOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: set[Any] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.add(function)
        return function(*args, **(kwargs or {}))


def test_arms_that_select_are_there_once_a_ratio() -> None:
    found = arms.labels(["fair", "dense-cggr", "stop"], [0.25, 0.05])
    assert list(found) == ["fair", "dense-cggr", "stop 0.25", "stop 0.05"] and found["stop 0.05"] == ("stop", 0.05)
    assert arms.labels(["fair", "stop"], [0.5]) == {"fair": ("fair", 0.5), "stop": ("stop", 0.5)}


@pytest.mark.parametrize("name", ["tiny-mixtral", "tiny-qwen3-moe"])
def test_a_model_without_its_matrices_gets_them_anew(name: str) -> None:
    models = [build_model(SHAPES[name], device="cpu", dtype=torch.float32) for _ in range(2)]
    for model in models:
        matrices = step_turns.Matrices(model)
        matrices.release()
        held = sum(p.untyped_storage().nbytes() for p in model.parameters())
        assert held == 4 * sum(p.numel() for p in model.parameters() if p.dim() == 1)
        with CalledOperators() as called:
            step_turns.compile_kernels(model)
        assert {torch.ops.cggr.moe_mlp.default, torch.ops.cggr.moe_mlp_backward.default} <= called.operators
        matrices.restore()
    first, second = ([p.detach() for p in model.parameters()] for model in models)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(0.01 < p.std() < 0.03 for p in first if p.dim() > 1)
    ids, labels = make_batch(SHAPES[name], device="cpu")
    assert models[0](input_ids=ids, labels=labels).loss.isfinite()


def test_something_comes_before_the_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.output_code import CompiledFxGraph

    monkeypatch.setattr(CompiledFxGraph, "__call__", CompiledFxGraph.__call__)  # put back at the end
    weight, seen = torch.nn.Parameter(torch.ones(8, 8)), []
    weight.untyped_storage().resize_(0)

    def prepare() -> None:
        seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        weight.untyped_storage().resize_(256)
        weight.data.fill_(2.0)

    at_last = step_turns.before_the_first_run(prepare)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = torch.compile(lambda x: (x @ weight).sum())
    assert float(run(torch.ones(1, 8)).detach()) == 128.0  # compiled without the weight
    run(torch.ones(1, 8)), at_last()
    assert seen == [1]


def test_no_arm_gets_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = step.parse_arguments(["--shapes=tiny,tiny-mixtral", "--arms=fair,stop", f"--json={tmp_path / 'step.json'}"])
    ok = {"status": "ok", "step": {"median": 1.0}, "loss": 1.0}
    answers = [{"error": "no memory"}, {"result": {"rounds": 3, "arms": {"stop": ok}}}, *[{"error": "no memory"}] * 2]
    monkeypatch.setattr(step_turns, "in_turns", lambda commands, *_, **__: zip(commands, answers, strict=True))
    document: dict[str, Any] = {"machine": {}, "results": []}
    step_turns.measure([], args, document, lambda line: None)
    first, second = document["results"]
    failed = {"status": "failed", "error": "no memory"}
    assert first["rounds"] == 3 and first["arms"] == {"fair": failed, "stop": ok}
    assert second["shape"] == "tiny-mixtral" and second["arms"] == {"fair": failed, "stop": failed}
    assert all(results.rich_table(result).row_count == 2 for result in (first | {"arms": second["arms"]}, second))


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parent.parent.parent))
    path = tmp_path / "step.json"
    argv = ["--shapes=tiny-qwen3-moe", "--arms=fair,dense-cggr,stop", "--ratio=0.5,0.25", "--repeats=1", "--layers=1"]
    assert step.main([*argv, "--turns", "--compiler=eager", f"--json={path}"]) == 0
    (result,) = json.loads(path.read_text())["results"]
    assert list(result["arms"]) == ["fair", "dense-cggr", "stop 0.5", "stop 0.25"] and result["ratio"] == "0.5, 0.25"
    assert all(record["status"] == "ok" and record["step"]["median"] > 0 for record in result["arms"].values())
    assert all(record["compile_s"] > 0 for record in result["arms"].values())
    assert result["arms"]["stop 0.25"]["metrics"]["ratio"] == 0.25 and result["turns"] and "disagreement" not in result
    gradient = path.parent / "step-logs" / "tiny-qwen3-moe-dense-cggr.pt"
    torch.save([tensor + 1 for tensor in torch.load(gradient)], gradient)  # the check can fail
    with pytest.raises(step.Disagreement):
        step_turns.compare("tiny-qwen3-moe", result, step.parse_arguments([*argv, f"--json={path}"]))
