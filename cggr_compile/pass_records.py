"""What the optimising passes found in a graph, kept beside Inductor's cache: a graph out of it does not run them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from cggr_compile import compat, joint
from cggr_compile.engine import Engine
from cggr_compile.options import Options
from cggr_compile.pipeline import joint_passes
from cggr_compile.report import GraphReport, PassRecord

CACHED = "from Inductor's cache; when first compiled: "
NOT_KEPT = "from Inductor's cache: it ran when this graph was first compiled, and what it found is not kept"


@contextmanager
def kept(
    gm: GraphModule, inputs: Sequence[Any], engine: Engine, options: Options, report: GraphReport
) -> Iterator[None]:
    """Around the compilation of ``gm``: keep the records of the passes that run, or add those kept earlier."""
    if engine == "eager":  # no cache: the passes run every time
        yield
        return
    path = _place(gm, inputs, engine, options, report)  # a compiler may change the graph
    yield
    ran = [record for record in report.passes if record.stage == "joint"]
    if ran:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")  # another process may be reading
        unfinished.write_text(json.dumps([dataclasses.asdict(record) for record in ran]), encoding="utf-8")
        unfinished.replace(path)
    elif path.exists():
        for fields in json.loads(path.read_text(encoding="utf-8")):
            report.passes.append(PassRecord(**{**fields, "reason": CACHED + fields["reason"], "seconds": 0.0}))
    else:
        report.passes += [PassRecord(joint_pass.name, "joint", None, NOT_KEPT) for joint_pass in joint_passes(options)]


def _place(gm: GraphModule, inputs: Sequence[Any], engine: Engine, options: Options, report: GraphReport) -> Path:
    """A file whose name depends on all that the passes see."""
    described = [
        (*map(str, (t.shape, t.stride(), t.dtype, t.device)), t.requires_grad) if isinstance(t, Tensor) else str(t)
        for t in inputs
    ]
    # AOTAutograd traces under the autocast that Dynamo's graph does not show
    autocast = [(torch.is_autocast_enabled(kind), str(torch.get_autocast_dtype(kind))) for kind in ("cpu", "cuda")]
    keys = [joint.source_digest(), *joint.passes_key(options, report), engine, described, autocast]
    facts = json.dumps([*keys, gm.print_readable(print_output=False)], default=str)
    return compat.inductor_cache_dir() / "cggr" / f"{hashlib.sha256(facts.encode()).hexdigest()}.json"
