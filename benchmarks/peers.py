"""What else makes fine-tuning cheaper, as a user applies it; each shares the parameters of the other arms' model.

liger           Liger-Kernel: ``apply_liger_kernel_to_llama(model=...)``, run eagerly, as its trainers do.
liger-compiled  the same under ``torch.compile``, if that gives one graph.
cce             cut-cross-entropy: the compiled body of `fair`, and the head's loss by ``linear_cross_entropy``, which
                never makes logits and leaves rows without a label out.

None knows that the gradient of most rows of the body could be spared: that is what they are compared for.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from arms import Step, dense_compiler, loss_of, without_mask
from rounds import Unavailable
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

PEERS = ("liger", "liger-compiled", "cce")


def build_peer(name: str, model: LlamaForCausalLM, *, compiler: str, cuda_graphs: bool) -> Step:
    """One of PEERS; compiled, where it is, at its first call.

    Raises:
        Unavailable: its package is not installed.
    """
    how = dense_compiler(compiler, cuda_graphs=cuda_graphs)
    if name == "cce":
        return _cut_cross_entropy(model, how)
    return _liger(model, how if name == "liger-compiled" else None)


def _cut_cross_entropy(model: LlamaForCausalLM, how: dict[str, Any]) -> Step:
    linear_cross_entropy = _package("cut_cross_entropy").linear_cross_entropy
    twin = without_mask(model)
    body = torch.compile(twin.model, fullgraph=True, **how)

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        hidden = body(input_ids=ids).last_hidden_state
        loss: Tensor = linear_cross_entropy(hidden, twin.lm_head.weight, labels, shift=True)
        return loss

    return step


def _liger(model: LlamaForCausalLM, how: dict[str, Any] | None) -> Step:
    apply_liger_kernel_to_llama = _package("liger_kernel.transformers").apply_liger_kernel_to_llama
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    # Liger replaces names of transformers' module as well, for every model: this arm alone is to see them
    with _restored():
        apply_liger_kernel_to_llama(model=twin)
        patched = dict(vars(modeling_llama))
    run = loss_of(twin) if how is None else torch.compile(loss_of(twin), fullgraph=True, **how)

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        with _restored():
            vars(modeling_llama).update(patched)
            return run(ids, labels)

    return step


@contextmanager
def _restored() -> Iterator[None]:
    """Afterwards transformers' module is as it was."""
    before = dict(vars(modeling_llama))
    try:
        yield
    finally:
        vars(modeling_llama).update(before)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Unavailable(f"no module {error.name}") from error
