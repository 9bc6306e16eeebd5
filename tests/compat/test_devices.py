"""What the machine can do."""

from __future__ import annotations

from cggr_compile import compat


def test_cpp_compiler(monkeypatch):
    from torch._inductor import cpp_builder, exc

    def missing():
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    assert compat.cpp_compiler() is None
