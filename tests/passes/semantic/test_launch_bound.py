from __future__ import annotations

from types import SimpleNamespace

import models
import pytest
import torch

from cggr_compile.causes import Cause
from cggr_compile.passes.semantic import launch_bound


@pytest.fixture
def captured(monkeypatch, decoder_step):
    """A step as on a GPU with one multiprocessor."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=1))

    def capture(pays=True, **options):
        captured = decoder_step(options, models.Decoder())
        captured.ctx.pays_launches = pays
        return captured

    return capture


def test_small_steps_stay_dense(captured):
    step = captured()
    result = step.run("launch_bound")
    assert not result.matched and "cuda_graphs" in result.reason and "launch_bound" in result.reason
    assert result.cause is Cause.LAUNCH_BOUND


def test_where_launches_do_not_count(captured):
    assert captured(pays=False).run("launch_bound").cause is None
    assert captured(launch_bound="select").run("launch_bound").cause is None


def test_threshold_is_the_estimate(captured, monkeypatch):
    """Both sides of it, with the arithmetic written out."""
    decoder = models.Decoder()
    matrices = decoder.wte.weight.numel()  # the tied head
    matrices += sum(p.numel() for p in decoder.blocks.parameters() if p.dim() == 2)
    batch, length = models.make_batch()["input_ids"].shape
    flops = 6 * batch * length * matrices + 7 * models.LAYERS * batch * length**2 * models.HIDDEN
    milliseconds = flops / (launch_bound.TFLOPS_PER_SM[4] * 1e9)
    monkeypatch.setattr(launch_bound, "LAUNCH_MS_PER_LAYER", 0.0)
    for factor, cause in ((0.99, None), (1.01, Cause.LAUNCH_BOUND)):
        monkeypatch.setattr(launch_bound, "LAUNCH_MS", milliseconds * factor)
        assert captured().run("launch_bound").cause is cause
