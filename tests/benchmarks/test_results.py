"""Medians, ratios and tables of the step benchmark."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("transformers")

import results
import step
import timing


def sample(forward: float, backward: float) -> timing.Sample:
    return timing.Sample(forward, backward, forward + backward, loss=1.0, peak_mb=100 * forward, saved_mb=None)


def document(**changes: Any) -> dict[str, Any]:
    fair, fast = ([sample(i + 1.0, factor * (i + 1)) for i in range(3)] for factor in (3.0, 1.0))
    records = {
        name: {"status": "ok", "compile_s": 1.0, "compile_cached": False, **results.summary(samples, 1000)}
        for name, samples in (("fair", fair), ("selective", fast))
    }
    records["plain"] = {"status": "failed", "error": "OutOfMemoryError"}
    result = {"shape": "tiny", "device": "cuda", "layers": 2, "shortened": False, "dtype": "float32", "ratio": 0.25}
    return {"results": [result | {"cuda_graphs": False, "rounds": 3, "arms": records} | changes]}


def test_medians_and_ratios() -> None:
    (result,) = document()["results"]
    fair = result["arms"]["fair"]
    assert fair["step"] == {"median": 8.0, "quartiles": [4.0, 8.0, 12.0]}
    assert fair["peak_mb"] == 300 and fair["saved_mb"] is None and fair["tokens_per_s"] == 1000 / 8e-3
    assert results.times_faster(result, "fair", "selective", "backward") == 3.0
    assert results.times_faster(result, "fair", "selective", "step") == 2.0
    assert results.times_faster(result, "plain", "selective", "step") is None
    assert results.times_faster(result, "fair", "selective", "peak_mb") == 1.0
    # disturbed rounds leave a ratio alone that the ratio of the medians would get wrong
    result["arms"]["fair"]["samples"]["step"], result["arms"]["selective"]["samples"]["step"] = [4, 40, 4], [20, 20, 2]
    assert results.times_faster(result, "fair", "selective", "step") == 2.0


def test_merged_table_and_markdown(tmp_path, capsys) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    machine = dict.fromkeys(("device", "threads", "torch", "triton", "transformers", "date"), "?")
    for path, graphs in zip(paths, (False, True), strict=True):
        results.save({"machine": machine, **document(cuda_graphs=graphs)}, path)
    assert step.main(["--merge", *map(str, paths), "--readme"]) == 1, "a failed arm makes the command fail"
    printed = capsys.readouterr().out
    assert "| tiny | selective | 2.0 | 2.0 | 4.0 | 3.00 | 2.00 | 300 | 1.00 |" in printed
    assert "| tiny (CUDA graphs) | fair | 2.0 | 6.0 | 8.0 | 1.00 | 1.00 | 300 | 1.00 |" in printed
    assert "| tiny | plain | failed: OutOfMemoryError | – |" in printed


@pytest.mark.parametrize("changes", [{"shortened": True}, {"rounds": 0}], ids=str)
def test_a_rehearsal_is_not_published(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="tiny"):
        results.markdown([document(**changes)])
