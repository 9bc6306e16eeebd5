"""What only captures a graph costs little: four layers, so that there is something before, between and behind."""

from __future__ import annotations

import models
import pytest


@pytest.fixture(autouse=True)
def _four_layers(monkeypatch):
    monkeypatch.setattr(models, "LAYERS", 4)
