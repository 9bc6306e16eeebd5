"""Accelerate's plain loop: the runtime is registered for its checkpoints, and steps are counted by hand."""

from __future__ import annotations

import pytest
import torch
from trainers import OPTIONS, Collator, Tokens, plain, same, weights

import cggr_compile

accelerate = pytest.importorskip("accelerate")


def train(folder, steps, resume=None, save=None):
    """The loop of docs/fine-tuning.md, for optimizer steps ``steps``."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, project_dir=str(folder))
    model = plain()
    model.compile(backend="cggr", options={**OPTIONS, "advance": "manual", "warmup_steps": 3, "ladder": [1.0, 0.5]})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = torch.utils.data.DataLoader(Tokens(), 2, collate_fn=Collator())
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    runtime = cggr_compile.runtime(model)
    accelerator.register_for_checkpointing(runtime)
    if resume is not None:
        accelerator.load_state(str(resume))
    for index, batch in enumerate(loader):
        with accelerator.accumulate(model):
            if index // 2 in steps:
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
                if accelerator.sync_gradients:
                    runtime.step()
        if save is not None and index + 1 == 2 * save[0]:
            accelerator.save_state(str(save[1]))
    return weights(model), runtime


def test_resumes_from_a_checkpoint(tmp_path):
    expected, first = train(tmp_path, range(4), save=(2, tmp_path / "state"))
    got, second = train(tmp_path, range(2, 4), resume=tmp_path / "state")
    assert first.metrics() == second.metrics() and second.metrics()["step"] == 4
    assert torch.equal(first.selected, second.selected) and same(got, expected)
