"""``python -m cggr_compile doctor|explain|diff|reference-loss``."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cggr_compile.doctor import findings
from cggr_compile.explain import explain
from cggr_compile.graph_diff import diff_stages
from cggr_compile.precompute import reference_loss


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="cggr_compile", description="Inspect the cggr backend, prepare its data.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="versions, device, compiler, and which path will run and why")
    show = commands.add_parser(
        "explain", help="what the backend does with a model: passes, matches, reasons; builds it with random weights"
    )
    show.add_argument("model", help="a transformers config folder or config.json, or package.module:function")
    show.add_argument("--batch", type=int, default=2, help="sequences in the trial batch (default 2)")
    show.add_argument("--seq", type=int, default=64, help="tokens per sequence (default 64)")
    show.add_argument("--options", type=json.loads, default={}, help='JSON, such as \'{"gradient": "exact"}\'')
    show.add_argument("--save", metavar="DIR", help="also write report.json, report.txt and the graphs there")
    stages = commands.add_parser("diff", help="what changed between two stages of a dumped graph; 1 if anything did")
    stages.add_argument("before", help="a file of the dump, or its beginning: graphs/07, graphs/select_rows")
    stages.add_argument("after", help="another one of the same dump, or of another run's")
    losses = commands.add_parser(
        "reference-loss", help='the losses of reference models on a dataset, for scoring="excess", as a .npy file'
    )
    losses.add_argument("models", nargs="+", metavar="MODEL", help="folders of transformers models, of one tokenizer")
    losses.add_argument("--tokens", required=True, metavar="NPY", help="integers [N, S], the sequences to train on")
    losses.add_argument("--labels", metavar="NPY", help="the same shape, -100 where there is no label; else the tokens")
    losses.add_argument("--out", required=True, metavar="NPY", help="float32 [N, S], the result")
    losses.add_argument("--combine", choices=("mean", "min"), default="mean", help="several models (default: mean)")
    losses.add_argument("--batch", type=int, default=8, help="sequences at a time (default 8)")
    losses.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default cpu)")
    chosen = parser.parse_args(arguments)
    try:
        return _COMMANDS[chosen.command](chosen)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _doctor(chosen: argparse.Namespace) -> int:
    table = Table(show_header=False)
    for subject, finding in findings():
        table.add_row(subject, finding)
    Console().print(table)
    return 0


def _explain(chosen: argparse.Namespace) -> int:
    options = dict(chosen.options)
    if chosen.save:
        options["dump_dir"] = chosen.save
    model, vocab = _build(chosen.model)
    ids = torch.randint(0, vocab, (chosen.batch, chosen.seq))
    explanation = explain(model.train(), input_ids=ids, labels=ids.clone(), options=options)
    print(explanation)
    if chosen.save:
        print(f"written: {explanation.save(chosen.save)}")
    return 0 if explanation.matched else 1


def _diff(chosen: argparse.Namespace) -> int:
    lines = diff_stages(chosen.before, chosen.after)
    colours = {"+": "green", "-": "red", "@": "cyan"}
    for line in lines:
        Console(soft_wrap=True).print(line, style=colours.get(line[:1]), markup=False, highlight=False)
    return 1 if lines else 0


def _reference_loss(chosen: argparse.Namespace) -> int:
    work = reference_loss(
        chosen.models,
        chosen.tokens,
        chosen.out,
        labels=chosen.labels,
        combine=chosen.combine,
        batch_size=chosen.batch,
        device=chosen.device,
    )
    with Progress() as progress:
        task = progress.add_task("reference loss", total=1.0)
        for done in work:
            progress.update(task, completed=done)
    print(f"written: {chosen.out}")
    return 0


def _build(source: str) -> tuple[torch.nn.Module, int]:
    """A model with random weights and its vocabulary size; nothing is downloaded."""
    if ":" in source and not Path(source).exists():
        module, _, name = source.partition(":")
        try:
            model = getattr(importlib.import_module(module), name)()
        except (ImportError, AttributeError) as error:
            raise ValueError(f"model: cannot import {source!r}: {error}") from error
    else:
        path = Path(source)
        if not path.exists():
            raise ValueError(f"model must be a config folder, a config.json or module:function; no such file: {source}")
        model = _from_config(path)
    embedding = next((m for m in model.modules() if isinstance(m, torch.nn.Embedding)), None)
    if embedding is None:
        raise ValueError(f"model: {source!r} has no token embedding")
    return model, embedding.num_embeddings


def _from_config(path: Path) -> Any:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise ValueError("model: a transformers config needs transformers (pip install transformers)") from error
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))


_COMMANDS = {"doctor": _doctor, "explain": _explain, "diff": _diff, "reference-loss": _reference_loss}

if __name__ == "__main__":
    sys.exit(main())
