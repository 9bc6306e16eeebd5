"""The HTML report: of a call, of a run's folder; what a browser makes of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace

import models
import numpy as np
import pytest
import torch

import cggr_compile
from cggr_compile import MetricsLogger
from cggr_compile.__main__ import main
from cggr_compile.charts import histogram, line_chart
from cggr_compile.explanation import Explanation
from cggr_compile.run_folder import report_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
BREAKS_OUT = "</script><b>"  # a token whose text must not end the page's data


def words(ids):
    return BREAKS_OUT if ids[0] % 3 == 0 else f" w{ids[0]}"


@pytest.fixture(scope="module")
def explanation():
    model, batch = models.family("llama", num_hidden_layers=2), models.make_batch(3, 32)
    batch["labels"][:, :16] = -100
    return batch, cggr_compile.explain(model, **batch, options={"selection": "importance", "context": 2})


def dom(path, fragment=""):
    if CHROMIUM is None:
        pytest.skip("no chromium")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{path}{fragment}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def marks(page, name):
    return len(re.findall(rf'<span class="token [^"]*\b{name}\b', page.split('id="tokens"')[1]))


def test_view_is_the_selection(explanation):
    batch, found = explanation
    view, valid = found.view, torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:] != -100
    assert torch.equal(torch.tensor(view.candidate), valid)
    selected, gradient = torch.tensor(view.selected), torch.tensor(view.gradient)
    assert selected.sum(1).tolist() == [8, 8, 8] and not (selected & ~valid).any()
    before = torch.zeros_like(selected)
    for distance in (1, 2):
        before[:, :-distance] |= selected[:, distance:]
    assert torch.equal(gradient, selected | before)  # there is room for all context
    assert torch.equal(torch.tensor(view.weight) > 0, selected)


def test_view_is_what_the_next_step_selects():
    model = models.compiled(models.PlainLM())
    batch = models.make_batch()
    view = cggr_compile.explain(model, **batch).view
    runtime = cggr_compile.runtime(model)
    model(**batch).loss.backward()
    chosen = [[int(p) for p in row if p >= 0] for row in runtime.selected]
    assert [[i for i, one in enumerate(row) if one] for row in view.selected] == chosen
    mean = [
        s for row, valid in zip(view.score, view.candidate, strict=True) for s, v in zip(row, valid, strict=True) if v
    ]
    assert sum(mean) / len(mean) == pytest.approx(runtime.metrics()["avg_difficulty"], rel=1e-4)


def test_page_in_a_browser(explanation, tmp_path):
    batch, found = explanation
    path = found.to_html(tmp_path / "new" / "report.html", decode=words)
    view = found.view
    for number in (0, 2):
        page = dom(path, f"#{number}")
        assert f"sequence {number + 1} of 3" in page
        context = [g and not s for g, s in zip(view.gradient[number], view.selected[number], strict=True)]
        assert marks(page, "loss") == sum(view.selected[number]) and marks(page, "context") == sum(context)
        assert marks(page, "candidate") == sum(view.candidate[number])
        text = "".join(map(words, ([one] for one in batch["input_ids"][number].tolist())))
        shown = re.sub(r"<[^>]*>", "", re.search(r'id="tokens">(.*?)</div>', page, re.S)[1])
        assert shown == text.replace("<", "&lt;").replace(">", "&gt;")


def test_page_without_a_browser(explanation, tmp_path):
    _, found = explanation
    page = found.to_html(tmp_path / "report.html", decode=words).read_text()
    assert 'class="level routed"' in page and page.count('class="layer routed"') == 2
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched
    assert page.count("</script>") == 2
    assert "+    cggr_state" in page and "<summary>00_captured</summary>" in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert data[0][1]["text"] in (BREAKS_OUT, f" w{found.ids[0][1]}")
    counts = dict(re.findall(r'data-(candidate|loss|context)="(\d+)"', page))
    assert int(counts["loss"]) == sum(map(sum, found.view.selected)) == 24


def test_dense_page(tmp_path):
    found = cggr_compile.explain(models.PlainLM().eval(), **models.make_batch())
    page = found.to_html(tmp_path / "report.html").read_text()
    assert found.view is None and 'class="level dense"' in page and 'id="selection"' not in page


def test_a_graph_that_waits_says_so(explanation, tmp_path):
    graphs = [replace(graph, waiting=True) for graph in explanation[1].graphs]
    page = Explanation(graphs, [[] for _ in graphs], None, lambda: None).to_html(tmp_path / "page.html").read_text()
    assert "Graph 0: training · not needed so far" in page and "not needed" not in page.replace(
        "not needed so far", "", 1
    )


def test_page_of_a_run(explanation, tmp_path):
    _, found = explanation
    found.save(tmp_path)
    metrics = {"step": 0, "ratio": 0.5, "labels_overflow": 0, "level": "routed"}
    log = MetricsLogger(lambda: metrics, tmp_path / "metrics.jsonl", figures=metrics)
    for metrics["step"] in range(3):
        log.log(loss=3.0 - metrics["step"])
    page = report_run(tmp_path, tmp_path / "page.html").read_text()
    assert "Graph 0" in page and 'data-loss="24"' in page
    assert re.findall(r"<figcaption>(\w+)<", page) == ["loss", "ratio", "overflow"]
    state = {"log_history": [{"step": 5, "loss": 1.5, "cggr/ratio": 0.25}, {"step": 5, "eval_loss": 2.0}]}
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "metrics.jsonl").unlink()
    assert "eval_loss" in report_run(tmp_path, tmp_path / "page.html").read_text()


def test_page_of_a_dump(tmp_path):
    model = models.compiled(models.PlainLM(), dump_dir=str(tmp_path))
    model(**models.make_batch())
    page = report_run(tmp_path, tmp_path / "page.html").read_text()
    assert "Graph 0" in page and "what it changed" in page


def test_command_line(tmp_path, capsys):
    models.family("llama", num_hidden_layers=1).config.save_pretrained(tmp_path)
    data = tmp_path / "tokens.npy"
    np.save(data, np.arange(60).reshape(3, 20))
    out = tmp_path / "page.html"
    command = [
        "report",
        "--model",
        str(tmp_path),
        "--data",
        str(data),
        "--out",
        str(out),
        "--batch",
        "2",
        "--seq",
        "16",
    ]
    assert main(command) == 0
    assert f"written: {out}" in capsys.readouterr().out and '"text": "24"' in out.read_text()
    for wrong, message in (
        (["report"], "takes the folder of a run, or --model"),
        (["report", str(tmp_path / "checkpoint")], "run must be a folder"),
        (["report", "--model", str(tmp_path)], "data must be given"),
        ([*command[:4], str(tmp_path / "none.npy")], "no such file"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err


def test_charts():
    assert line_chart({"a": [(0, float("nan"))]}) == "" == histogram({"a": []}, 3)
    chart = histogram({"all": [0.0, 1.0, 2.0, 3.0], "some": [3.0]}, 3)
    heights = [float(height) for height in re.findall(r'height="([\d.]+)" fill', chart)]
    assert heights[:3] == [heights[0], heights[0], 2 * heights[0]] and heights[3:] == [0.0, 0.0, heights[0]]
