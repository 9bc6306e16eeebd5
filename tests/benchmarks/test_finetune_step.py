"""The fine-tuning benchmark: every arm computes the loss of the same labels, peers keep to themselves."""

from __future__ import annotations

import itertools
import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
pytest.importorskip("peft")

import finetune_arms
import finetune_step
import longest
import peers
from arms import without_mask
from longest import Trial
from shapes import SHAPES, build_model, make_batch
from transformers.models.llama import modeling_llama

RUN = ["--shapes=tiny", "--layers=1", "--compiler=eager", "--context=8"]
LABELS = 16  # a quarter of tiny's 64 tokens


def results(path: Any) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["results"]


# ---------------------------------------------------------------------------------------------------------------
# The command


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora",
    [[], pytest.param(["--lora=2", "--dtype=bfloat16"], marks=pytest.mark.slow)],
    ids=["all weights", "adapters"],
)
def test_every_arm_has_the_loss_of_the_same_labels(lora, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)  # as if it were not installed
    path = tmp_path / "finetune.json"
    arms = ["plain", "fair", "fair-checkpointed", "ours", "ours-no-context-stop", "liger"]
    run = [*RUN, *lora, "--shares=25", "--repeats=1", f"--arms={','.join(arms)}", f"--json={path}"]
    assert finetune_step.main(run) == 0, "what is not installed is no failure"
    (result,) = results(path)
    assert list(result["arms"]) == arms and result["labelled"] == LABELS
    missing = result["arms"].pop("liger")
    assert missing["status"] == "unavailable" and "liger_kernel" in missing["error"]
    records = result["arms"]
    losses = {name: record["loss"] for name, record in records.items()}
    assert losses == pytest.approx(dict.fromkeys(losses, losses["fair"]), rel=1e-5)
    saved = {name: record["saved_mb"] for name, record in records.items()}
    assert saved["fair-checkpointed"] < saved["fair"] and saved["ours-no-context-stop"] < saved["ours"] < saved["fair"]
    for name, rows in (("ours", LABELS + 8), ("ours-no-context-stop", LABELS)):
        metrics = records[name]["metrics"]
        assert metrics["gradient_tokens"] == 2 * rows and metrics["tokens_selected"] == 2 * LABELS
        assert metrics["labels_overflow"] == metrics["context_overflow"] == 0
        assert records[name]["options"]["max_selected"] == rows, "slots for what is not there"
    assert "liger unavailable: no module liger_kernel" in capsys.readouterr().out


def test_dense_arms_are_compiled_once_for_all_shares(tmp_path, monkeypatch) -> None:
    built = []
    original = finetune_arms.build_baseline

    def build(name: str, *args: Any, **kwargs: Any) -> Any:
        built.append(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(finetune_arms, "build_baseline", build)
    path = tmp_path / "finetune.json"
    assert finetune_step.main([*RUN, "--shares=25,50", "--repeats=1", "--arms=fair", f"--json={path}"]) == 0
    quarter, half = results(path)
    assert built == ["fair"] and (quarter["labelled"], half["labelled"]) == (LABELS, 2 * LABELS)
    assert half["arms"]["fair"]["compile_cached"] and quarter["arms"]["fair"]["loss"] != half["arms"]["fair"]["loss"]


def test_merged_table_names_the_workload(tmp_path, capsys) -> None:
    path = tmp_path / "finetune.json"
    run = ["--shapes=tiny", "--compiler=eager", "--shares=25", "--repeats=1", "--lora=2", "--arms=fair"]
    assert finetune_step.main([*run, f"--json={path}"]) == 0
    capsys.readouterr()
    assert finetune_step.main(["--merge", str(path), "--readme"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:2] == ["tiny, 25 % labels, context 128, LoRA r = 2", "fair"] and len(cells) == 11
    assert cells[5:7] == ["1.00", "1.00"] and cells[9] == "1.00" and float(cells[10]) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shares=0"], "--shares"),
        (["--context=-1"], "--context"),
        (["--lora=0"], "--lora"),
        (["--start=1000"], "--granularity"),
        (["--arms=stop"], "stop: not among plain"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, message, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        finetune_step.main(arguments)
    assert caught.value.code == 2 and message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------
# What is compared


def test_the_labels_are_at_the_end() -> None:
    ids, labels = make_batch(SHAPES["tiny"], device="cpu", labelled=LABELS)
    assert bool((labels[:, :-LABELS] == -100).all()) and torch.equal(labels[:, -LABELS:], ids[:, -LABELS:])
    assert [finetune_arms.labelled_tokens(share, 4096) for share in (0.05, 0.25, 1.0)] == [205, 1024, 4096]
    options = finetune_arms.our_options("ours", labelled=60, context=8, length=64)
    assert options["max_selected"] == 64, "more slots than positions"


def test_adapters_are_all_that_is_trained() -> None:
    model = finetune_arms.add_adapters(build_model(SHAPES["tiny"], device="cpu", dtype=torch.bfloat16), 2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 7 and all("lora_" in name for name in trained)  # layers, matrices, linears
    ids, labels = make_batch(SHAPES["tiny"], device="cpu")
    without_mask(model)(input_ids=ids, labels=labels).loss.backward()
    assert all(bool(p.grad.any()) for p in model.parameters() if p.requires_grad), "a gradient of zero compares nothing"


def fake_liger(factor: float) -> SimpleNamespace:
    """Patches what Liger patches: names of transformers' module, for every model, and the given model's forward."""

    def rotary(q, k, cos, sin, unsqueeze_dim=1):
        assert modeling_llama.LlamaMLP == "Liger's", "called without the names that were replaced"
        return original(q, k, cos, sin, unsqueeze_dim)

    def apply(model) -> None:
        modeling_llama.apply_rotary_pos_emb, modeling_llama.LlamaMLP = rotary, "Liger's"
        forward = model.forward
        model.forward = lambda **batch: SimpleNamespace(loss=factor * forward(**batch).loss)

    original = modeling_llama.apply_rotary_pos_emb
    return SimpleNamespace(apply_liger_kernel_to_llama=apply)


def test_liger_is_kept_from_other_arms(monkeypatch) -> None:
    before = dict(vars(modeling_llama))
    model = build_model(SHAPES["tiny"], device="cpu", dtype=torch.float32, layers=1)
    batch = make_batch(SHAPES["tiny"], device="cpu", labelled=LABELS)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", fake_liger(1.0))
    liger = peers.build_peer("liger", model, compiler="eager", cuda_graphs=False)
    assert dict(vars(modeling_llama)) == before
    liger(*batch).backward()
    gradient = model.model.layers[0].mlp.up_proj.weight.grad.clone()
    assert dict(vars(modeling_llama)) == before and "forward" not in vars(model)
    model.zero_grad()
    model(input_ids=batch[0], labels=batch[1]).loss.backward()
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj.weight.grad, gradient)


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_a_peer_that_computes_something_else_has_failed(factor, tmp_path, monkeypatch) -> None:
    def linear_cross_entropy(hidden, weight, labels, *, shift):
        assert shift
        return factor * F.cross_entropy((hidden[:, :-1] @ weight.T).flatten(0, 1), labels[:, 1:].flatten())

    fake = SimpleNamespace(linear_cross_entropy=linear_cross_entropy)
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", fake)
    path = tmp_path / "finetune.json"
    run = [*RUN, "--shares=25", "--repeats=1", "--arms=fair,cce", f"--json={path}"]
    assert finetune_step.main(run) == int(factor != 1.0)
    (result,) = results(path)
    assert result["arms"]["fair"]["status"] == "ok" and result["rounds"] == 1
    assert factor == 1.0 or "loss of cce" in result["arms"]["cce"]["error"]


# ---------------------------------------------------------------------------------------------------------------
# The longest sequence


def tried(limit: int, room: float, **options: Any) -> list[Trial]:
    """A device where lengths up to ``limit`` fit; by the memory of what fitted, ``room`` times the limit would."""

    def attempt(length: int) -> Trial:
        return Trial(length, length <= limit, peak_mb=100.0 + length, free_mb=100.0 + room * limit, seconds=60.0)

    return list(itertools.islice(longest.search(attempt, start=16384, step=1024, **options), 100))


@pytest.mark.parametrize("room", [0.5, 1.0, 1.05, 2.0])
@pytest.mark.parametrize("limit", [1000, 20_000, 63_000, 450_000])
def test_search_finds_the_longest(limit: int, room: float) -> None:
    trials = tried(limit, room)
    assert longest.bracket(trials) == (limit // 1024 * 1024, limit // 1024 * 1024 + 1024)
    lengths = [trial.length for trial in trials]
    assert len(set(lengths)) == len(lengths) <= 16, "a length was tried twice, or too many were"


def test_search_goes_where_memory_points() -> None:
    assert [trial.length for trial in tried(63_000, 1.0)] == [16384, 32768, 62464, 63488]


def test_search_ends() -> None:
    assert longest.bracket(tried(10**9, 1.0, most=70_000)) == (69632, None)
    assert len(tried(450_000, 1.05, seconds=0.0)) == 1
    assert len(tried(450_000, 1.05, seconds=50.0)) == 1, "a minute does not fit into 50 seconds"


def test_a_trial_says_why_it_failed(monkeypatch) -> None:
    args = finetune_step.parse_arguments([*RUN, "--labelled=4"])
    fitting = longest.run_trial("fair", "tiny", 32, args)
    assert fitting.fits and fitting.step_ms and fitting.length == 32

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(longest, "build_trained", full)
    assert longest.run_trial("fair", "tiny", 32, args).note == "OutOfMemoryError: no room"


def test_longest_command(tmp_path, monkeypatch, capsys) -> None:
    def attempt(arm: str, shape: str, length: int, args: Any) -> Trial:
        limit = {"fair": 70, "ours": 300}[arm]
        return Trial(length, length <= limit, None, None, 10.0, note="" if length <= limit else "OutOfMemoryError: x")

    monkeypatch.setattr(longest, "_in_new_process", attempt)
    path = tmp_path / "longest.json"
    run = [*RUN, "--longest", "--arms=fair,ours", "--start=32", "--granularity=32", "--most=4096", f"--json={path}"]
    assert finetune_step.main(run) == 0
    assert [len(search["trials"]) for search in json.loads(path.read_text())["longest"]] == [4, 8]
    capsys.readouterr()
    assert finetune_step.main(["--merge", str(path)]) == 0
    printed = capsys.readouterr().out
    (fair,) = [line.split("│") for line in printed.splitlines() if "│ fair" in line]
    (ours,) = [line.split("│") for line in printed.splitlines() if "│ ours" in line]
    assert [cell.strip() for cell in fair[4:6]] == ["64", "96"]
    assert [cell.strip() for cell in ours[4:6]] == ["288", "320"] and ours[9].strip() == "4.50"


@pytest.mark.slow
def test_a_trial_runs_in_a_process_of_its_own() -> None:
    args = finetune_step.parse_arguments([*RUN, "--labelled=4"])
    trial = longest._in_new_process("fair", "tiny", 32, args)
    assert trial.fits and trial.seconds > 0.5
