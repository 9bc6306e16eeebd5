from __future__ import annotations

from cggr_compile import doctor


def test_findings_name_the_path():
    rows = dict(doctor.findings())
    assert rows["backend registered"] == "yes"
    assert rows["path"].endswith("for models on the CPU")


def test_without_a_cpp_compiler(monkeypatch):
    monkeypatch.setattr("cggr_compile.compat.cpp_compiler", lambda: None)
    rows = dict(doctor.findings())
    assert rows["C++ compiler"] == "none" and "eager (no C++ compiler" in rows["path"]
