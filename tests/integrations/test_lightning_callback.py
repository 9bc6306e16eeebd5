"""Lightning's Trainer with ``CGGRCallback``."""

from __future__ import annotations

import pytest
import torch
from trainers import OPTIONS, Collator, Tokens, plain, same, weights

import cggr_compile

lightning = pytest.importorskip("lightning")

from cggr_compile.integrations.lightning import CGGRCallback  # noqa: E402
from cggr_compile.metrics_logger import LEVELS  # noqa: E402

WARM_UP = {**OPTIONS, "warmup_steps": 3, "ladder": [1.0, 0.5], "seed": 7}


class Lit(lightning.LightningModule):
    def __init__(self, parts=("model",)):
        super().__init__()
        for part in parts:
            setattr(self, part, plain())
        self.figures = []

    def training_step(self, batch, index):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def on_train_batch_end(self, *args):
        self.figures.append({name: float(value) for name, value in self.trainer.callback_metrics.items()})


# Lightning begins a stopped epoch anew, so all batches are alike
DATA = torch.utils.data.Subset(Tokens(), [0, 1] * 12)


def fit(folder, lit, steps, *, options=WARM_UP, checkpoint=None):
    callback = CGGRCallback(**options)
    trainer = lightning.Trainer(
        max_steps=steps,
        accumulate_grad_batches=2,
        log_every_n_steps=1,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )
    trainer.fit(lit, torch.utils.data.DataLoader(DATA, 2, collate_fn=Collator()), ckpt_path=checkpoint)
    return trainer, callback


def test_trains_and_resumes(tmp_path):
    path, whole, half, rest = tmp_path / "a.ckpt", Lit(), Lit(), Lit()
    _, first = fit(tmp_path, whole, 4)
    runtime = cggr_compile.runtime(whole.model)
    assert runtime is first._training.runtime and runtime.metrics()["step"] == 4 and runtime.metrics()["matched"]
    ratios = [figures["cggr/ratio"] for figures in whole.figures[1::2]]
    assert ratios == [1.0, 1.0, 0.5, 0.25] and whole.figures[-1]["cggr/level"] == LEVELS["routed"]
    assert whole.figures[1]["cggr/level"] == LEVELS["dense"]

    trainer, _ = fit(tmp_path, half, 2)
    trainer.save_checkpoint(path)
    saved = torch.load(path, weights_only=False)["callbacks"]["CGGRCallback"]
    assert saved["step"] == 2 and saved["seed"] == 7
    _, last = fit(tmp_path, rest, 4, checkpoint=str(path))
    assert last._training.runtime.metrics() == runtime.metrics()
    assert torch.equal(last._training.runtime.selected, runtime.selected)
    assert same(weights(rest), weights(whole)) and not same(weights(rest), weights(half))


def test_which_module(tmp_path):
    two = Lit(("model", "teacher"))
    with pytest.raises(ValueError, match=r"module must be given .*\['model', 'teacher'\]"):
        fit(tmp_path, two, 1)
    with pytest.raises(ValueError, match="module must name a part of Lit"):
        fit(tmp_path, two, 1, options={"module": "student"})
    two.teacher.requires_grad_(False)
    fit(tmp_path, two, 1, options=OPTIONS)
    assert cggr_compile.runtime(two.model).metrics()["step"] == 1


def test_options():
    with pytest.raises(ValueError, match="unknown option"):
        CGGRCallback(ratio=0.5)
