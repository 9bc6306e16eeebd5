"""``step.py --turns``: every arm in a process of its own. All compile at once; then each has the device to itself.

A process compiles without the matrices of its model: their memory is given back until its turn. So models of half the
device's memory can be compiled side by side. The arms' rounds are not interleaved then.
"""

from __future__ import annotations

import argparse
import fcntl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from agreement import Disagreement, check_dense
from arms import DENSE, SELECTIVE, labels
from results import save
from rounds import step_run
from shapes import SHAPES
from torch import nn
from turns import cards, in_turns, wait_for_turn

WARM_ROWS = 512  # tokens with which kernels of experts are compiled


class Matrices:
    """A model's parameters of two and more dimensions, which give their memory back and get it anew."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [p for p in model.parameters() if p.dim() > 1]
        self._bytes = [p.untyped_storage().nbytes() for p in self._parameters]
        self._std = float(getattr(model.config, "initializer_range", 0.02))

    def release(self) -> None:
        for parameter in self._parameters:
            parameter.untyped_storage().resize_(0)

    @torch.no_grad()
    def restore(self) -> None:
        """With random values, the same in every process."""
        torch.manual_seed(0)
        for parameter, size in zip(self._parameters, self._bytes, strict=True):
            parameter.untyped_storage().resize_(size)
            parameter.normal_(0.0, self._std)


def before_the_first_run(prepare: Callable[[], None]) -> Callable[[], None]:
    """``prepare`` is called once, when something that Inductor has compiled first runs; or by what is returned."""
    from torch._inductor.output_code import CompiledFxGraph

    run, left = CompiledFxGraph.__call__, [prepare]

    def first() -> None:
        if left:
            left.pop()()

    def call(self: Any, *args: Any) -> Any:
        first()
        return run(self, *args)

    CompiledFxGraph.__call__ = call  # type: ignore[method-assign, assignment]
    return first


def run(shape: str, label: str, args: argparse.Namespace, answers: TextIO) -> dict[str, Any]:
    """One arm, in its process: the result of the shape with this arm alone."""
    document: dict[str, Any] = {"machine": {}, "results": []}
    args.arms, args.ratio = [labels(args.arms, args.ratio)[label][0]], [labels(args.arms, args.ratio)[label][1]]
    waited = [0.0]
    matrices: list[Matrices] = []

    def turn() -> None:
        begin = time.perf_counter()
        wait_for_turn(answers)
        for one in matrices:
            one.restore()
        waited[0] += time.perf_counter() - begin

    logs = logs_of(args)
    with (logs / "lock").open("w") as lock:  # one model at a time has its memory
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = step_run(shape, args, document, lambda line: print(line, file=sys.stderr, flush=True))
        matrices.append(Matrices(done.model))
        matrices[0].release()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    if args.device == "cuda" and args.arms[0] in SELECTIVE:
        compile_kernels(done.model)
        torch.cuda.empty_cache()
    turn_at_last = before_the_first_run(turn)
    if args.compiler == "eager":
        turn_at_last()  # nothing is compiled
        waited[0] = 0.0
    args.json = logs / f"{shape}-{label}.json"
    done.run()
    (record,) = done.records.values()
    if "compile_s" in record:
        record["compile_s"] -= waited[0]
    if done.gradients:
        torch.save(next(iter(done.gradients.values())), args.json.with_suffix(".pt"))
    turn_at_last()  # it had failed before
    return {"result": {**done.result, "arms": {label: record}}}


def compile_kernels(model: Any) -> None:
    """Triton compiles the kernels of experts at their first launch: by a few tokens, while other arms compile."""
    from cggr_compile.ops.moe import moe

    experts = next((m for m in model.modules() if hasattr(m, "gate_up_proj") and hasattr(m, "down_proj")), None)
    if experts is None or experts.gate_up_proj.dim() != 3:
        return
    matrices = [torch.zeros_like(p, requires_grad=True) for p in (experts.gate_up_proj, experts.down_proj)]
    count, _, hidden = matrices[0].shape
    top_k = model.config.num_experts_per_tok
    tokens = torch.randn(WARM_ROWS, hidden, device=matrices[0].device, dtype=matrices[0].dtype, requires_grad=True)
    chosen = torch.rand(WARM_ROWS, count, device=tokens.device).topk(top_k).indices
    weights = torch.rand(WARM_ROWS, top_k, device=tokens.device, dtype=tokens.dtype, requires_grad=True)
    moe(tokens, *matrices, weights, chosen).sum().backward()


def logs_of(args: argparse.Namespace) -> Path:
    folder: Path = args.json.parent / f"{args.json.stem}-logs"
    return folder


def measure(argv: list[str], args: argparse.Namespace, document: dict[str, Any], say: Callable[[str], None]) -> None:
    """Appends every shape's result to the document, with all its arms; ``disagreement`` where the dense ones differ."""
    begin = [sys.executable, str(Path(__file__).with_name("step.py")), *argv, "--run"]
    names = {(shape, label): f"{shape}-{label}" for shape in args.shapes for label in labels(args.arms, args.ratio)}
    commands = {name: [*begin, *pair] for pair, name in names.items()}
    results: dict[str, dict[str, Any]] = {}
    for shape in args.shapes:  # until an arm says more
        facts = {
            "shape": shape,
            "dtype": args.dtype or SHAPES[shape].dtype,
            "layers": args.layers,
            "device": args.device,
        }
        facts |= {"shortened": args.layers is not None, "cuda_graphs": args.cuda_graphs, "rounds": 0, "arms": {}}
        results[shape] = facts
        document["results"].append(facts)
    ratios = ", ".join(f"{ratio:g}" for ratio in args.ratio)
    found = in_turns(commands, cards(args.device), logs_of(args), within=args.within)
    for (shape, label), (name, answer) in zip(names, found, strict=True):
        result = answer.get("result")
        record = result["arms"][label] if result else {"status": "failed", "error": answer["error"]}
        results[shape] |= {**(result or {}), "ratio": ratios, "turns": True, "arms": results[shape]["arms"]}
        results[shape]["arms"][label] = record
        what = f"{record['step']['median']:.1f} ms" if record["status"] == "ok" else record["error"]
        say(f"{name}: {what}")
        save(document, args.json)
    for shape, result in results.items():
        try:
            compare(shape, result, args)
        except Disagreement as error:
            result["disagreement"] = str(error)
            say(f"{shape}: {error}")
    save(document, args.json)


def compare(shape: str, result: dict[str, Any], args: argparse.Namespace) -> None:
    losses = {a: r["loss"] for a, r in result["arms"].items() if a in DENSE and r["status"] == "ok"}
    gradients = {arm: torch.load(logs_of(args) / f"{shape}-{arm}.pt") for arm in losses}
    check_dense(losses, gradients, result["dtype"])
