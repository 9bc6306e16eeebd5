"""The kernel benchmark runs, and compares the operator with the right thing."""

from __future__ import annotations

import json

import kernels as benchmark
import pytest
import selected_ce
import torch
import torch.nn.functional as F


def test_rehearsal(tmp_path, capsys):
    assert benchmark.main(["--tiny", "--json", str(tmp_path / "kernels.json")]) == 0
    document = json.loads((tmp_path / "kernels.json").read_text())
    assert [entry["name"] for entry in document["results"]] == [
        "product alone (mm)",
        "score_partials",
        "score and difficulty",
        "score and difficulty, fp8",
        "forward, flash",
        "dense backward, flash",
        "rows, gradients of selected keys",
        "rows, gradients of all keys",
        "selected-ce, logits",
        "selected-ce, chunked",
        "selected-ce, cggr",
        *(["selected-ce, torch"] if hasattr(F, "linear_cross_entropy") else []),
        *["token-log-probs, all logits", "token-log-probs, cggr"] * 3,
    ]
    assert all(entry["ms"] > 0 and entry["tflops"] > 0 for entry in document["results"])
    assert [entry["rank_correlation"] > 0.9 for entry in document["results"][2:4]] == [True, True]
    assert document["card"]["copy_gb_per_s"] > 0
    assert "score_partials" in capsys.readouterr().out


def test_ways_to_compute_the_loss_agree():
    rows, weight = torch.randn(16, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    labels = torch.randint(0, 50, (16,))
    found = []
    for arm in selected_ce.arms("cpu").values():
        loss = arm.loss(rows, weight, labels)
        found.append((loss.detach(), *torch.autograd.grad(loss, (rows, weight))))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_ways_to_compute_log_probabilities_agree():
    states, weight = torch.randn(16, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    labels = torch.randint(0, 50, (16,))
    labels[::2] = -100
    found = []
    for arm in (benchmark._of_all_logits, benchmark._ours):
        values = arm(states, weight, labels)
        found.append((*values, *torch.autograd.grad(values[0].sum() + values[1].sum(), (states, weight))))
    torch.testing.assert_close(*found)


def test_rank_correlation():
    values = torch.tensor([3.0, 1.0, 2.0, 10.0])
    assert benchmark.rank_correlation(values, values.exp()) == pytest.approx(1.0)
    assert benchmark.rank_correlation(values, -values) == pytest.approx(-1.0)


def test_graphs_need_a_device(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--tiny", "--cuda-graphs"])
    assert "--cuda-graphs needs a CUDA device" in capsys.readouterr().err


def test_logsumexp_is_that_of_the_attention():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    rows = torch.tensor([[0, 3, 8], [1, 2, 5]])
    logsumexp = benchmark._logsumexp(query, key, rows)
    scores = query @ key.repeat_interleave(2, 1).mT / 8**0.5
    scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
    at = rows[:, None, :, None].expand(-1, 4, -1, 9)
    weights = torch.exp(scores.gather(2, at) - logsumexp[..., None])
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    expected = out.gather(2, at[..., :8])
    torch.testing.assert_close(weights @ value.repeat_interleave(2, 1), expected)
