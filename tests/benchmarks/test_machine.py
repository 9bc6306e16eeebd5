"""What a benchmark says of the machine it ran on."""

from __future__ import annotations

import machine


def test_how_threads_wait_is_told_where_it_is_set(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert machine.describe("cpu")["threads"].endswith("CPU threads")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert machine.describe("cpu")["threads"].endswith("CPU threads (OMP_WAIT_POLICY=PASSIVE)")
