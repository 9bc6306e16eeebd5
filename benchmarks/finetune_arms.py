"""The arms of the fine-tuning benchmark: what computes the loss of the labelled tokens, and its gradient.

plain, fair, fair-checkpointed  the dense model (see arms.py).
ours                  ``backend="cggr"``: gradient on the rows of the labels, and on the context before them.
ours-stop             the same with ``kv_gradient="stop"``.
ours-auto             ``selection="auto"``, the default: slots as the first batch needs them, fewer for the loss.
ours-no-context       gradient on the rows of the labels alone.
ours-no-context-stop  the same with ``kv_gradient="stop"``.
liger, liger-compiled, cce      the peers (see peers.py).

All have the same loss: every label counts in each of them.
"""

from __future__ import annotations

import argparse
import functools
import math
from typing import Any

import peft
import torch
from arms import BASELINES, Step, build_baseline, build_selective
from peers import PEERS, build_peer
from rounds import Arm
from shapes import Shape, build_model
from torch import Tensor
from transformers import LlamaForCausalLM

OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours-stop": {"kv_gradient": "stop"},
    "ours-auto": {"selection": "auto"},
    "ours-no-context": {"context": 0},
    "ours-no-context-stop": {"context": 0, "kv_gradient": "stop"},
}
ARMS = (*BASELINES, *OURS, *PEERS)


def labelled_tokens(share: float, length: int) -> int:
    """How many tokens at the end of a sequence have a label: that share of it, rounded up."""
    return math.ceil(round(share * length, 6))


def our_options(arm: str, *, labelled: int, context: int, length: int) -> dict[str, Any]:
    """Options of one of OURS for sequences whose last ``labelled`` tokens have a label: slots for just these rows."""
    chosen = {"selection": "labels", "context": context, "launch_bound": "select", **OURS[arm]}
    if chosen["selection"] == "auto":
        return chosen
    return chosen | {"scoring": "random", "max_selected": min(length, labelled + chosen["context"])}


def add_adapters(model: LlamaForCausalLM, rank: int) -> LlamaForCausalLM:
    """Freezes the model and gives every linear layer but the head a LoRA adapter, in place, as PEFT does by default:
    adapters in float32. Neither of an adapter's matrices is zero, so that both have a gradient to compare."""
    config = peft.LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    adapted: LlamaForCausalLM = peft.get_peft_model(model, config).get_base_model()
    return adapted


def under_autocast(step: Step, device: str) -> Step:
    """The step as trainers run bfloat16 models with float32 adapters."""

    def run(ids: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return step(ids, labels)

    return run


def build_trained(shape: Shape, args: argparse.Namespace) -> LlamaForCausalLM:
    """The shape's model, with adapters if ``args.lora`` is their rank."""
    model = build_model(shape, device=args.device, dtype=getattr(torch, args.dtype or shape.dtype), layers=args.layers)
    return add_adapters(model, args.lora) if args.lora is not None else model


class FinetuneArms:
    """The arms of one model. What does not depend on the labels is compiled once, for all of its batches."""

    def __init__(self, model: LlamaForCausalLM, args: argparse.Namespace, *, length: int) -> None:
        self.model, self.args, self.length = model, args, length
        self.autocast = args.lora is not None and model.dtype == torch.bfloat16
        self._built: dict[str, Step] = {}

    def of(self, labelled: int, dump_name: str) -> dict[str, Arm]:
        """For batches whose last ``labelled`` tokens have a label; graphs are dumped in a folder ``dump_name``."""
        found = {}
        for name in self.args.arms:
            if name in OURS:
                build = functools.partial(self.build_ours, name, labelled, dump_name)
                found[name] = Arm(build, selective=True, same=("loss",))
            else:
                build = functools.partial(self.build_dense, name)
                found[name] = Arm(build, same=("loss", "gradient") if name in PEERS else ())
        return found

    def build_ours(self, name: str, labelled: int, dump_name: str) -> Step:
        args = self.args
        options = our_options(name, labelled=labelled, context=args.context, length=self.length)
        options |= {"compiler": args.compiler, "cuda_graphs": args.cuda_graphs}
        options["dump_dir"] = str(args.dump_dir / dump_name / name) if args.dump_dir else None
        return self._as_trained(build_selective(self.model, options))

    def build_dense(self, name: str) -> Step:
        """A baseline or a peer."""
        if name not in self._built:
            build = build_baseline if name in BASELINES else build_peer
            step = build(name, self.model, compiler=self.args.compiler, cuda_graphs=self.args.cuda_graphs)
            self._built[name] = self._as_trained(step)
        return self._built[name]

    def _as_trained(self, step: Step) -> Step:
        return under_autocast(step, self.args.device) if self.autocast else step
