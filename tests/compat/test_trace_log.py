"""The structured trace log."""

from __future__ import annotations

import logging

from cggr_compile import compat


def test_an_artifact():
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    log = logging.getLogger("torch.__trace")
    log.addHandler(handler)
    try:
        compat.trace_structured("cggr_test", lambda: "what there is to say")
    finally:
        log.removeHandler(handler)
    (found,) = (r for r in records if r.metadata.get("artifact", {}).get("name") == "cggr_test")
    assert found.payload == "what there is to say" and found.metadata["artifact"]["encoding"] == "string"
