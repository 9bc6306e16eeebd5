"""Every Python block of the documentation runs, given a model and batches (``doc_pages.given``)."""

from __future__ import annotations

from typing import Any

import doc_pages
import models
import pytest
import torch
from doc_pages import PAGES, blocks, given
from trainers import Collator, Tokens

import cggr_compile

# It takes two processes: tests/semantics/test_data_parallel.py, test_fsdp.py and test_shard.py are about what it shows.
LEFT_OUT = "docs/distributed.md"
BLOCKS = {
    f"{name} {i}": block
    for name, page in PAGES.items()
    if name != LEFT_OUT
    for i, block in enumerate(blocks(page, "python"))
}
QUICK = ["docs/api.md 0", "docs/api.md 1", "docs/extending.md 2", "docs/moe.md 0", "docs/quickstart.md 0"]


@pytest.fixture
def _plain_operations(monkeypatch):
    """Code generation is not what these blocks are about: ``compiler`` is ``eager`` where they do not say."""
    monkeypatch.setitem(cggr_compile.Options.__init__.__kwdefaults__, "compiler", "eager")


SETTINGS = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "use_cpu": True, "report_to": []}
SETTINGS |= {"save_strategy": "no", "disable_tqdm": True}


def of_training(folder: Any) -> dict[str, Any]:
    import lightning
    import transformers

    class Module(lightning.LightningModule):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    model = models.family("llama", num_hidden_layers=1)
    return {
        "Trainer": transformers.Trainer,
        "args": transformers.TrainingArguments(output_dir=str(folder), **SETTINGS),
        "data": Tokens(4),
        "module": Module(model),
        "loader": torch.utils.data.DataLoader(Tokens(4), 2, collate_fn=Collator()),
    }


def of_preferences(folder: Any) -> dict[str, Any]:
    import trl
    import trl_setup

    pairs = models.make_batch(ignored=False)
    settings = {**SETTINGS, "bf16": False, "max_completion_length": 6, "num_generations": 2}
    return {
        "model": trl_setup.model(),
        "reference": trl_setup.model(),
        "pairs": {"input_ids": pairs["input_ids"], "completion_mask": torch.ones_like(pairs["input_ids"])},
        "tokenizer": trl_setup.tokenizer(),
        "data": trl_setup.completions().remove_columns("completion"),
        "reward": lambda completions, **rest: [float(text.count("w1")) for text in completions],
        "args": trl.GRPOConfig(output_dir=str(folder), **settings),
    }


MORE = {
    "README.md": of_training,
    "docs/quickstart.md": of_training,
    "docs/fine-tuning.md": of_training,
    "docs/rl-and-preferences.md": of_preferences,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_plain_operations")
@pytest.mark.parametrize("name", models.slow_but(QUICK, BLOCKS))
def test_blocks_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    more = MORE.get(name.partition(" ")[0])
    names = given() | (more(tmp_path) if more else {})
    block = BLOCKS[name]
    capsys.readouterr()
    doc_pages.run(block, names)
    if block.prints is not None:
        assert capsys.readouterr().out.strip() == block.prints
    assert_trained(block, names)


def assert_trained(block: doc_pages.Block, names: dict[str, Any]) -> None:
    """What a block compiles is selective: a model that stays dense would run as well."""
    if not any(mark in block.code for mark in ('backend="cggr"', "CGGRCallback(", "train_step(")):
        return
    if not any(call in block.code for call in ("backward(", ".train()", ".fit(")):
        if "CGGRCallback(" in block.code or "train_step(" in block.code:
            return
        names["model"](input_ids=names["ids"], labels=names["labels"]).loss.backward()
    model = names["module"].model if ".fit(" in block.code else names["model"]
    metrics = cggr_compile.runtime(model).metrics()
    assert metrics["level"] == "routed" or metrics["ratio"] == 1.0, metrics["fallback_reason"]
