"""The times that the cost model predicts for an H200, beside those measured on one (`docs/benchmarks.md`).

No model of that size is built: expressions of a narrow one of the same kind are evaluated at the shape's sizes.
It exits with 1 if a step's ratio, dense over ours, is more than 10 % off.

    python benchmarks/cost_model.py
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from arguments import items
from arms import SELECTIVE, without_mask
from finetune_arms import OURS, add_adapters, labelled_tokens
from rich.console import Console
from rich.table import Table
from shapes import MODELS, SHAPES, Shape
from transformers import AutoModelForCausalLM, LlamaConfig

from cggr_compile.cost.card import CARDS, Card, seconds
from cggr_compile.cost.step import Cost, cost
from cggr_compile.options import Options

H200 = next(card for card in CARDS if card.name == "H200")
CONTEXT = 128


@dataclass(frozen=True)
class Measured:
    """Rows of the tables in `docs/benchmarks.md`: forward and backward ms, or the step's.

    Attributes:
        labels: share of the positions that have a label; None: all.
    """

    shape: str
    dense: tuple[float, ...]
    arms: dict[str, tuple[float, ...]]
    labels: float | None = None
    graphs: bool = False
    lora: int | None = None


MEASURED = (
    Measured("135m-16x2048", (30.3, 64.7), {"stop": (31.1, 16.3), "selective": (29.9, 20.4)}),
    Measured("360m-8x2048", (31.9, 66.5), {"stop": (32.8, 17.1), "selective": (32.2, 21.0)}),
    Measured("1b-8x1024", (37.9, 74.6), {"stop": (38.7, 20.0), "selective": (38.6, 21.9), "random": (31.5, 21.6)}),
    Measured("1b-4x4096", (83.3, 167.4), {"stop": (84.7, 39.5), "selective": (84.8, 46.3)}),
    Measured("135m-16x512", (7.0, 15.6), {"stop": (7.5, 4.8), "selective": (7.3, 5.7)}, graphs=True),
    Measured("135m-4x512", (2.6, 6.0), {"stop": (2.7, 2.5), "selective": (2.7, 2.8)}, graphs=True),
    Measured(
        "1b-4x4096",
        (82.6, 159.2),
        {
            "ours": (62.8, 22.6),
            "ours-stop": (64.5, 16.1),
            "ours-no-context": (62.9, 16.5),
            "ours-no-context-stop": (64.2, 11.6),
        },
        labels=0.05,
    ),
    Measured("1b-4x4096", (79.5, 160.6), {"ours": (64.1, 31.7), "ours-stop": (65.9, 24.1)}, labels=0.10),
    Measured("1b-4x4096", (81.8, 163.2), {"ours": (69.9, 57.6), "ours-stop": (71.7, 47.4)}, labels=0.25),
    Measured(
        "135m-8x2048",
        (49.1,),
        {"ours": (21.4,), "ours-stop": (18.7,), "ours-no-context": (18.4,), "ours-no-context-stop": (16.4,)},
        labels=0.05,
        graphs=True,
    ),
    Measured("135m-8x2048", (49.0,), {"ours": (23.5,), "ours-stop": (21.3,)}, labels=0.10, graphs=True),
    Measured("135m-8x2048", (49.2,), {"ours": (28.6,), "ours-stop": (25.4,)}, labels=0.25, graphs=True),
    Measured("8b-4x2048", (232.3, 279.2), {"ours": (209.2, 63.3)}, labels=0.10, lora=16),
)
# sizes of the narrow model, none of which is another one's
NARROW = {"batch": 3, "length": 40, "layers": 6, "labels": 8, "context": 2}
_narrow: dict[Any, Cost] = {}


def narrow_cost(shape: Shape, arm: str, *, labels: bool, lora: int | None) -> Cost:
    """Of a model of the shape's kind that is built in no time."""
    key = (MODELS[shape.model]["tie_word_embeddings"], arm, labels, lora)
    if key not in _narrow:
        sizes = {"vocab_size": 211, "hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 4}
        config = LlamaConfig(
            **{**MODELS[shape.model], **sizes, "intermediate_size": 72, "num_hidden_layers": NARROW["layers"]},
            head_dim=8,
            use_cache=False,
        )
        torch._dynamo.reset()
        model = without_mask(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train())
        if lora is not None:
            model = add_adapters(model, 5)
        ids = torch.randint(0, 200, (NARROW["batch"], NARROW["length"]))
        targets = ids.clone()
        options: dict[str, Any] = dict(SELECTIVE.get(arm, {}))
        if labels:
            targets[:, : -NARROW["labels"]] = -100
            options = {"selection": "labels", "context": NARROW["context"], **OURS[arm], "scoring": "random"}
            options["max_selected"] = NARROW["labels"] + options["context"]
        with torch.autocast("cpu", torch.bfloat16, enabled=lora is not None):
            found = cost(model, (), {"input_ids": ids, "labels": targets}, Options.parse(options))
        assert found is not None and found.selective is not None
        _narrow[key] = found
    return _narrow[key]


def sizes_of(found: Cost, shape: Shape, arm: str, labels: float | None, lora: int | None) -> dict[str, float]:
    """The shape's values of the symbols."""
    config = MODELS[shape.model]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["hidden_size"] // heads
    by_value = {
        211: config["vocab_size"],
        48: config["hidden_size"],
        64: heads * width,
        32: kv * width,
        72: config["intermediate_size"],
        5: lora,
        4: 32,
    }
    sizes = {name: by_value[role.value] for name, role in found.roles.items()}
    if labels is None:
        rows = math.ceil(shape.length / 4)
        shares = {"rho": rows / shape.length}
    else:
        context = OURS[arm].get("context", CONTEXT)
        rows = labelled_tokens(labels, shape.length)
        shares = {"rho": (rows + context) / shape.length, "r": (rows + context) / shape.length}
    shares = {name: share for name, share in shares.items() if name in found.values}
    return {"B": shape.batch, "S": shape.length, "L": config["num_hidden_layers"], **sizes, **shares}


def times(found: Cost, step: Any, sizes: dict[str, float], card: Card, graphs: bool) -> tuple[float, float]:
    """Milliseconds of forward and backward."""
    values = found.substitution(**sizes)
    return tuple(1e3 * seconds(half, card, values, replayed=graphs) for half in (step.forward, step.backward))  # type: ignore[return-value]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted({row.shape for row in MEASURED})
    parser.add_argument("--shapes", type=items(allowed=names), default=names, help=f"of: {', '.join(names)}")
    args = parser.parse_args(argv)
    console, table = Console(width=140), Table(title=str(H200), title_justify="left")
    for column in (
        "shape",
        "labels",
        "arm",
        "dense ms",
        "measured",
        "arm's ms",
        "measured",
        "step ×",
        "measured",
        "off",
    ):
        table.add_column(column, justify="right" if column not in ("shape", "arm") else "left")
    offs = []
    for row in (row for row in MEASURED if row.shape in args.shapes):
        shape = SHAPES[row.shape]
        for arm, measured in row.arms.items():
            found = narrow_cost(shape, arm, labels=row.labels is not None, lora=row.lora)
            sizes = sizes_of(found, shape, arm, row.labels, row.lora)
            dense = times(found, found.dense, sizes, H200, row.graphs)
            ours = times(found, found.selective, sizes, H200, row.graphs)
            ratio, truth = sum(dense) / sum(ours), sum(row.dense) / sum(measured)
            offs.append(ratio / truth - 1)
            labels = "all" if row.labels is None else f"{row.labels:.0%}"
            table.add_row(
                f"{row.shape}{' (CUDA graphs)' if row.graphs else ''}{' LoRA' if row.lora else ''}",
                labels,
                arm,
                _ms(dense),
                _ms(row.dense),
                _ms(ours),
                _ms(measured),
                f"{ratio:.2f}",
                f"{truth:.2f}",
                f"{offs[-1]:+.1%}",
            )
    console.print(table)
    near = sum(abs(off) <= 0.1 for off in offs)
    console.print(f"{near} of {len(offs)} within 10 %")
    return int(near < len(offs))


def _ms(halves: tuple[float, ...]) -> str:
    return " / ".join(f"{half:.1f}" for half in halves)


if __name__ == "__main__":
    sys.exit(main())
