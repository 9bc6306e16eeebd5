"""``python -m cggr_compile doctor|explain|diff|report|advise|reference-loss``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cggr_compile import __version__
from cggr_compile.advise import advise
from cggr_compile.batch_source import FORMS, read_batches
from cggr_compile.doctor import findings
from cggr_compile.explain import explain
from cggr_compile.graph_diff import diff_stages
from cggr_compile.model_source import has_weights, load_model, load_tokenizer
from cggr_compile.precompute import reference_loss
from cggr_compile.run_folder import report_run


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="cggr_compile", description="Inspect the cggr backend, prepare its data.")
    parser.add_argument("--version", action="version", version=f"cggr_compile {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("doctor", help="versions, device, compiler, and which path will run and why")
    show = commands.add_parser(
        "explain",
        help="what the backend does with a model: passes, matches, reasons, cost; builds it with random weights",
    )
    show.add_argument("model", help="a transformers config folder or config.json, or package.module:function")
    show.add_argument("--batch", type=int, default=2, help="sequences in the trial batch (default 2)")
    show.add_argument("--seq", type=int, default=64, help="tokens per sequence (default 64)")
    show.add_argument("--options", type=json.loads, default={}, help='JSON, such as \'{"gradient": "exact"}\'')
    show.add_argument("--save", metavar="DIR", help="also write report.json, report.txt and the graphs there")
    stages = commands.add_parser("diff", help="what changed between two stages of a dumped graph; 1 if anything did")
    stages.add_argument("before", help="a file of the dump, or its beginning: graphs/07, graphs/select_rows")
    stages.add_argument("after", help="another one of the same dump, or of another run's")
    page = commands.add_parser(
        "report", help="an HTML page: graphs, passes, the selection over the text, a run's metrics"
    )
    page.add_argument("run", nargs="?", help="the folder of a run: a dump, metrics.jsonl, trainer_state.json")
    _add_model_and_data(page)
    page.add_argument("--out", default="report.html", metavar="HTML", help="the page (default report.html)")
    advice = commands.add_parser("advise", help="which options pay for a model and its data, measured here; or none")
    _add_model_and_data(advice)
    advice.add_argument("--count", type=int, default=2, help="batches to measure on (default 2)")
    advice.add_argument("--steps", type=int, default=5, help="timed steps of each setting (default 5)")
    advice.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ..."
    )
    advice.add_argument("--json", action="store_true", help="print JSON")
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


def _add_model_and_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", help="a transformers folder (random weights if it has none), or package.module:function")
    add("--data", metavar="FILE", help=f"token ids as .npy [N, S], or .jsonl with lines such as {FORMS}")
    add("--batch", type=int, default=4, help="sequences in a batch (default 4)")
    add("--seq", type=int, default=512, help="tokens per sequence (default 512)")
    add("--options", type=json.loads, default={}, help='JSON, such as \'{"selection": "labels"}\'')


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
    model, vocab = load_model(chosen.model)
    ids = torch.randint(0, vocab, (chosen.batch, chosen.seq))
    explanation = explain(model.train(), input_ids=ids, labels=ids.clone(), options=options)
    print(explanation)
    if explanation.cost is not None:
        print(explanation.cost)
    if chosen.save:
        print(f"written: {explanation.save(chosen.save)}")
    return 0 if explanation.matched else 1


def _diff(chosen: argparse.Namespace) -> int:
    lines = diff_stages(chosen.before, chosen.after)
    colours = {"+": "green", "-": "red", "@": "cyan"}
    for line in lines:
        Console(soft_wrap=True).print(line, style=colours.get(line[:1]), markup=False, highlight=False)
    return 1 if lines else 0


def _advise(chosen: argparse.Namespace) -> int:
    if chosen.model is None or chosen.data is None:
        raise ValueError("advise takes --model and --data")
    model, vocab = load_model(chosen.model, trained=True)
    tokenizer = load_tokenizer(chosen.model)
    count, size, seq = chosen.count, chosen.batch, chosen.seq
    batches = read_batches(chosen.data, tokenizer, size=size, seq=seq, count=count, vocab=vocab)
    on_device = [{name: value.to(chosen.device) for name, value in batch.items()} for batch in batches]
    advice = advise(model.to(chosen.device).train(), on_device, options=chosen.options, steps=chosen.steps)
    print(json.dumps(advice.as_dict(), indent=2) if chosen.json else advice)
    if Path(chosen.model).exists() and not has_weights(chosen.model):
        print("the weights are random: concentration and variance say nothing of a trained model", file=sys.stderr)
    return 0


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


def _report(chosen: argparse.Namespace) -> int:
    if (chosen.run is None) == (chosen.model is None):
        raise ValueError("report takes the folder of a run, or --model and --data")
    tokenizer = load_tokenizer(chosen.model) if chosen.model else None
    if chosen.run is not None:
        written = report_run(chosen.run, chosen.out)
    else:
        if chosen.data is None:
            raise ValueError("data must be given with --model: a .npy or .jsonl file")
        model, vocab = load_model(chosen.model, trained=True)
        batch = read_batches(chosen.data, tokenizer, size=chosen.batch, seq=chosen.seq, count=1, vocab=vocab)[0]
        explanation = explain(model.train(), **batch, options=chosen.options)
        written = explanation.to_html(chosen.out, decode=tokenizer.decode if tokenizer is not None else None)
    print(f"written: {written}")
    return 0


_COMMANDS = {
    "doctor": _doctor,
    "explain": _explain,
    "diff": _diff,
    "report": _report,
    "advise": _advise,
    "reference-loss": _reference_loss,
}

if __name__ == "__main__":
    sys.exit(main())
