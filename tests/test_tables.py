"""The tables of scorings and selections: one file adds one, and options and modules know it."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import compiled, make_batch
from reference import candidates, eager_call, hardest, shift
from training import RATIO, SLOTS, check_against_reference, metrics, picks, small

from cggr_compile import CGGRLoss, Options, scorings, selections
from cggr_compile.modules.settings import Settings
from cggr_compile.ops.ranking import comparable, ranks
from cggr_compile.scorings import SCORINGS
from cggr_compile.scorings.record import Scoring
from cggr_compile.selections import SELECTIONS
from cggr_compile.selections.record import Request, Selection
from cggr_compile.table import Table

TABLES = [(scorings, SCORINGS, "SCORING"), (selections, SELECTIONS, "SELECTION")]


def easiest(request: Request):
    """The tokens with the lowest scores of every sequence."""
    return request.valid & (ranks(comparable(-request.scores, request.valid), descending=True) < request.number), None


EASIEST = Selection(
    name="easiest", doc="the easiest", scores="needed", sampled=False, by_slots=easiest, by_share=easiest
)
UNSURE = Scoring(name="unsure", doc="1 - p_top1", formula=lambda logsumexp, top1: 1.0 - top1 + 0.0 * logsumexp)


@pytest.fixture
def registered():
    with SELECTIONS.register(EASIEST), SCORINGS.register(UNSURE):
        yield {"selection": "easiest", "scoring": "unsure"}
    with pytest.raises(ValueError, match="selection must be one of"):
        Options(selection="easiest")
    with pytest.raises(ValueError, match="scoring must be one of"):
        Options(scoring="unsure")


def test_a_record_trains_through_the_backend(registered):
    model, batch = small(num_hidden_layers=1), make_batch()
    compiled(model, **registered, min_tokens_ratio=RATIO, router_layers="full", router_precision="model")
    check_against_reference(model, batch)
    with torch.no_grad():
        top1 = eager_call(model, batch["input_ids"]).logits.softmax(-1).amax(-1)
    assert torch.equal(picks(model).rows, hardest(top1, candidates(shift(batch["labels"])), SLOTS))
    assert (metrics(model)["selection"], metrics(model)["scoring"]) == ("easiest", "unsure")


@pytest.mark.parametrize("whole", [False, True])
def test_a_record_trains_through_the_modules(registered, whole):
    with pytest.warns(UserWarning, match="selection='easiest' trains"):
        criterion = CGGRLoss(**registered, min_tokens_ratio=0.25, warmup_steps=0, dynamic_threshold=False)
    logits, targets = torch.randn(2, 8, 11, requires_grad=True), torch.randint(0, 11, (2, 8))
    targets[0, :3] = -100
    forward = torch.compile(criterion, backend="eager", fullgraph=True) if whole else criterion
    loss = forward(logits, targets)
    rows = hardest(logits.softmax(-1).amax(-1), targets != -100, 2)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 8)
    torch.testing.assert_close(loss, losses.gather(1, rows).mean())
    loss.backward()
    expected = torch.zeros(2, 8, dtype=torch.bool).scatter(1, rows, True)
    assert torch.equal(logits.grad.abs().sum(-1) > 0, expected)


@pytest.mark.parametrize(("package", "table", "attribute"), TABLES, ids=["scorings", "selections"])
def test_one_file_is_one_more(package, table, attribute, tmp_path, monkeypatch):
    """A copy of a record's file, with another name in it."""
    name = next(iter(table))
    (folder,) = package.__path__
    source = Path(folder, f"{name}.py").read_text()
    (tmp_path / "another.py").write_text(source.replace(f'name="{name}"', 'name="another"'))
    monkeypatch.setattr(package, "__path__", [folder, str(tmp_path)])
    try:
        more = Table.of_package(package.__name__, package.__path__, attribute)
    finally:
        sys.modules.pop(f"{package.__name__}.another", None)
    assert list(more) == sorted([*table, "another"]) and "another" not in table
    assert "`another`" in more.markdown() and "`another`" in more.listing()


@pytest.mark.parametrize(("package", "table", "attribute"), TABLES, ids=["scorings", "selections"])
def test_a_record_is_named_as_its_file(package, table, attribute):
    (folder,) = package.__path__
    assert sorted({path.stem for path in Path(folder).glob("*.py")} - {"__init__", "record"}) == list(table)


def test_docstrings_name_every_record():
    for table, holders in ((SCORINGS, [Options]), (SELECTIONS, [Options, Settings])):
        for holder in holders:
            offered = [name for name, record in table.items() if holder is Options or record.in_modules]
            assert "listed there" not in (holder.__doc__ or "")
            for name in offered:
                assert f"- `{name}`: " in (holder.__doc__ or ""), (holder, name)


def test_records_name_options_that_exist():
    known = {field.name for field in dataclasses.fields(Options)}
    for record in SELECTIONS.values():
        assert set(record.options) <= known and record.scopes and set(record.scopes) <= {"sequence", "batch"}
        assert all(option in record.doc or option == "max_selected" for option in record.options), record.name


def test_every_record_is_an_option():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in SCORINGS:
            assert Options(scoring=name).needs_router == (name != "random")
        for name in SELECTIONS:
            assert Options(selection=name).selection_record is SELECTIONS[name]


def test_refused_records():
    with pytest.raises(ValueError, match=r"formula of 'bad' must take some of \['logsumexp', .*it takes \['logits'\]"):
        Scoring(name="bad", doc="", formula=lambda logits: logits)
    with pytest.raises(ValueError, match="name must be new, got 'topk'"):
        SELECTIONS.register(SELECTIONS["topk"])


def test_another_formula_of_one_name_is_another_graph():
    """The graph holds the name alone, and Inductor caches what it compiles."""

    def digest(formula):
        with SCORINGS.register(Scoring(name="mine", doc="", formula=formula)):
            return Options(scoring="mine").digest()

    assert digest(lambda top1: 1.0 - top1) != digest(lambda top2: top2)
