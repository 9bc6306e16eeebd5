"""The results of the sweep: one JSON file, a line of the table, the page of the documentation."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from zoo.sizes import OTHERS
from zoo.tiny import causal_types

Results = dict[str, Any]


def versions() -> dict[str, str]:
    import transformers

    return {"torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__}


def load(path: Path) -> Results:
    """The results so far; none where they are of other versions."""
    found: Results = json.loads(path.read_text()) if path.exists() else {}
    return found if found.get("versions") == versions() else {"versions": versions(), "types": {}}


def save(path: Path, results: Results) -> None:
    path.parent.mkdir(exist_ok=True)
    rows = ",\n".join(f"  {json.dumps(n)}: {json.dumps(row)}" for n, row in sorted(results["types"].items()))
    head = json.dumps(results["versions"])
    path.write_text(f'{{"versions": {head}, "types": {{\n{rows}\n}}}}\n')


def level(row: dict[str, Any]) -> str:
    """ "routed", "routed in part", "loss" or "dense"; what failed otherwise."""
    if row["status"] != "right":
        return {"eager": "not tried", "torch.compile": "not tried", "wrong": "WRONG", "error": "ERROR"}[row["status"]]
    return "routed in part" if row["level"] == "routed" and row.get("dense") else row["level"]


def remark(row: dict[str, Any]) -> str:
    """Why it is not routed altogether."""
    if row["status"] != "right":
        return str(row["why"])
    return "; ".join(row.get("dense") or ()) or (row["reason"] or "" if row["level"] != "routed" else "")


def line(name: str, row: dict[str, Any]) -> str:
    error = "" if row.get("error") is None else f"{row['error']:.0e}"
    return f"{name:28} {level(row):15} {error:6} {row.get('seconds', 0):5.1f} s  {remark(row)[:160]}"


def summary(results: Results) -> str:
    """How many of the causal types reach which level, of those that train eagerly."""
    rows = [row for name, row in results["types"].items() if ":" not in name]
    counts = Counter(level(row) for row in rows)
    tried = len(rows) - counts["not tried"]
    routed, whole = counts["routed"] + counts["routed in part"], counts["routed"]
    wrong = counts["WRONG"] + counts["ERROR"]

    def share(count: int) -> str:
        return f"{count} ({count / max(1, tried):.0%})"

    return (
        f"{tried} of {len(rows)} causal types train eagerly; right {share(tried - wrong)}, at least at the level loss "
        f"{share(routed + counts['loss'])}, routed {share(routed)}, with nothing dense {share(whole)}"
    )


def page(results: Results) -> str:
    """Markdown."""
    named = " and ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = [
        "# Supported models",
        "<!-- written by `make zoo`; edit tests/zoo/page.py -->",
        f"Every causal language model of {named}, some masked ones and some that see images: each as a tiny model, "
        "trained on a CPU and compared with itself run eagerly. `make zoo` does it.",
        "| level | what runs on the selected positions |\n|---|---|\n"
        "| routed | head, loss and the backward pass of every layer |\n"
        "| routed in part | the same but for the operators that are named |\n"
        "| loss | head and loss; the gradient below is exact and dense |\n"
        "| dense | nothing: the model trains as if it were compiled without the backend |",
        summary(results) + ".",
    ]
    missing = [name for name in (*causal_types(), *OTHERS) if name not in results["types"]]
    if missing:
        parts.append(f"Shares are of what has been checked, not of all. Not checked yet: {', '.join(missing)}.")
    for kind, title in (("", "Causal"), ("masked", "Masked"), ("vision", "Images and text")):
        rows = [(n, row) for n, row in sorted(results["types"].items()) if n.partition(":")[2] == kind]
        if rows:
            body = "\n".join(f"| {n.partition(':')[0]} | {level(row)} | {_cell(remark(row))} |" for n, row in rows)
            parts.append(f"## {title}\n\n| type | level | what is not routed, and why |\n|---|---|---|\n{body}")
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
