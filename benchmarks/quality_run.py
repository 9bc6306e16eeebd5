"""Trains one arm for a number of measured seconds, and says what it learned.

Only training steps are measured: batch, forward, backward, clipping, optimizer. Compilation, the recording of CUDA
graphs and evaluation are outside. The clock is looked at where the held-out loss is taken anyway, never in between:
from one such point to the next the number of steps is planned from what steps took so far, so that training ends,
and the learning rate reaches zero, at the budget.

Precision on CUDA: the model is bfloat16, as in step.py, and the optimizer keeps float32 masters of the weights, as
Megatron and torchtitan do. Updates of bfloat16 weights themselves would be lost in rounding wherever they are below
1/256 of the weight. On a CPU everything is float32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from arms import loss_of, without_mask
from quality_text import IGNORE, Blocks
from timing import milliseconds, stamp
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import cggr_compile
from cggr_compile.backend import cggr
from cggr_compile.schedule import rungs

LR_WARMUP = 0.05  # share of the budget
LAST_LOOK = 0.97
EVAL_SEQUENCES = 32  # at a time
TIMED_STEPS = 12
WARM_UP = 4  # steps at every ratio: compilation, CUDA graphs' warm-up and recording, a replay


@dataclass(frozen=True)
class Size:
    """Dimensions of a Llama."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int

    @property
    def intermediate(self) -> int:
        return self.hidden * 8 // 3 // 32 * 32


SIZES = {
    "nano": Size(512, 64, 2, 4, 2),
    "micro": Size(2048, 128, 4, 4, 4),
    "23m": Size(8192, 512, 6, 8, 8),  # the prototype's
    "98m": Size(16384, 768, 12, 12, 4),
}


def build_model(size: Size, length: int, *, device: str, seed: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=length,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    return model.to(device).train()


class Masters:
    """AdamW over float32 copies of the trained parameters, or over the parameters where they are float32."""

    def __init__(self, model: torch.nn.Module, start: dict[str, Tensor], weight_decay: float = 0.1) -> None:
        named: list[tuple[str, Tensor]] = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.parameters = [p for _, p in named]
        self.masters = self.parameters
        for name, p in named:
            p.data.copy_(start[name])
        if any(p.dtype != torch.float32 for p in self.parameters):
            self.masters = [start[name].to(p.device, torch.float32, copy=True) for name, p in named]
            for master in self.masters:
                master.grad = torch.empty_like(master)
        device = self.parameters[0].device.type
        groups = [
            {"params": [m for m in self.masters if m.dim() >= 2], "weight_decay": weight_decay},
            {"params": [m for m in self.masters if m.dim() < 2], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=device == "cuda")

    def step(self, lr: float) -> None:
        """One update; the parameters have no gradients afterwards. Nothing waits for the device."""
        copies = self.masters is not self.parameters
        if copies:
            grads = [p.grad for p in self.parameters if p.grad is not None]
            torch._foreach_copy_([m.grad for m in self.masters if m.grad is not None], grads)
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        if copies:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.masters)
        for p in self.parameters:
            p.grad = None


def learning_rate(peak: float, share: float) -> float:
    """Linear warm-up, then a cosine down to zero, at this share of the budget."""
    if share < LR_WARMUP:
        return peak * share / LR_WARMUP
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (share - LR_WARMUP) / (1 - LR_WARMUP))))


def batches(blocks: Blocks, sequences: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled epochs without end; the same order of sequences for every batch size."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64, device=blocks.ids.device)
    while True:
        while len(order) < sequences:
            epoch = torch.randperm(len(blocks.ids), generator=generator).to(order.device)
            order = torch.cat([order, epoch])
        rows, order = order[:sequences], order[sequences:]
        yield blocks.ids[rows].long(), blocks.labels[rows].long()


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, blocks: Blocks) -> float:
    """Mean over all labels, of the uncompiled model: the same computation for every arm."""
    total = torch.zeros((), dtype=torch.float64, device=blocks.ids.device)
    for ids, labels in zip(blocks.ids.split(EVAL_SEQUENCES), blocks.labels.split(EVAL_SEQUENCES), strict=True):
        logits = model(input_ids=ids.long()).logits[:, :-1]
        total += F.cross_entropy(
            logits.flatten(0, 1).float(), labels[:, 1:].flatten().long(), ignore_index=IGNORE, reduction="sum"
        )
    return float(total / (blocks.labels[:, 1:] != IGNORE).sum())


class Trainer:
    """One arm's compiled step; trains from given weights as often as asked, compiled once."""

    def __init__(
        self,
        options: dict[str, Any] | None,
        size: Size,
        blocks: Blocks,
        held_out: Blocks,
        *,
        sequences: int,
        cuda_graphs: bool,
        compiler: str,
    ) -> None:
        self.device = blocks.ids.device.type
        self.blocks, self.held_out, self.sequences = blocks, held_out, sequences
        torch._dynamo.reset()
        self.model = build_model(size, blocks.ids.shape[1], device=self.device, seed=0)
        self.options = None
        mode = "reduce-overhead" if cuda_graphs else None
        if options is None:
            dense = "aot_eager" if compiler == "eager" else "inductor"
            self.step = torch.compile(loss_of(without_mask(self.model)), backend=dense, mode=mode)
        else:
            # a graph that is not rewritten is no result; whether launches pay is what the seconds will say
            options = {"fallback": "error", "launch_bound": "select", "compiler": compiler, **options}
            options.setdefault("cuda_graphs", cuda_graphs)
            self.options = cggr_compile.Options.parse(options)
            self.step = loss_of(torch.compile(self.model, backend=cggr, options=options))
        self.compile_s = 0.0
        self.seconds_per_step = self._warm_up()

    def _begin(self, start: dict[str, Tensor], seed: int) -> None:
        self.optimizer = Masters(self.model, start)
        self.batches = batches(self.blocks, self.sequences, seed)
        self._set_step(0, None, seed)

    def _set_step(self, step: int, ratio: float | None, seed: int = 0) -> None:
        """The backend's state: its step, its seed, and at which ratio of its ladder it runs next."""
        if self.options is not None:
            runtime = cggr_compile.runtime(self.model)
            state = runtime.state_dict()
            schedule = {**dict.fromkeys(state["schedule"]), "target": ratio}
            runtime.load_state_dict({**state, "step": step, "seed": seed, "schedule": schedule})

    def _train_step(self, lr: float) -> Tensor:
        ids, labels = next(self.batches)
        if self.device == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        loss = self.step(ids, labels)
        loss.backward()
        self.optimizer.step(lr)
        return loss.detach()

    def _warm_up(self) -> float:
        """Compiles whatever the training will need, and times some steps. The weights it leaves are to be replaced."""
        self._begin(dict(self.model.state_dict()), seed=0)
        begin = time.perf_counter()
        for ratio in rungs(self.options) if self.options is not None else (1.0,):
            for number in range(WARM_UP):
                # at steps 0 and 1: there "auto" measures
                self._set_step(number % 2, ratio)
                self._train_step(1e-4)
        self._wait()
        self.compile_s = time.perf_counter() - begin
        self._set_step(0, None)
        return self._timed([1e-4] * TIMED_STEPS) / TIMED_STEPS

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _timed(self, rates: list[float]) -> float:
        """Seconds of a step at each of these learning rates."""
        self._wait()
        start = stamp(self.device)
        for lr in rates:
            self._train_step(lr)
        end = stamp(self.device)
        self._wait()
        return milliseconds(start, end) / 1e3

    def train(
        self,
        start: dict[str, Tensor],
        *,
        lr: float,
        budget: float,
        evaluations: int,
        seed: int,
        limit: int | None = None,
        progress: Callable[[float, float], None] = lambda share, loss: None,
    ) -> dict[str, Any]:
        """Train for ``budget`` measured seconds, or for ``limit`` steps, from the weights ``start``.

        Returns:
            seconds, steps, tokens, final (held-out loss at the end), curve: [seconds, steps, held-out loss] at
            the start and ``evaluations`` + 1 points after it, metrics of the last step.
        """
        self._begin(start, seed)
        spent, steps, per_step = 0.0, 0, self.seconds_per_step
        loss = held_out_loss(self.model, self.held_out)
        curve = [[spent, steps, loss]]
        # one more look at the clock before the end, so that it is met
        for share in (*(point / evaluations for point in range(1, evaluations)), LAST_LOOK, 1.0):
            if limit is None:
                done, count = spent / budget, round((budget * share - spent) / per_step)
            else:
                done, count = steps / limit, round(limit * share) - steps
            if count < 1:
                continue
            taken = self._timed([learning_rate(lr, done + (share - done) * (i + 1) / count) for i in range(count)])
            spent, steps, per_step = spent + taken, steps + count, taken / count
            loss = held_out_loss(self.model, self.held_out)
            curve.append([spent, steps, loss])
            progress(share, loss)
        length = self.blocks.ids.shape[1]
        metrics = cggr_compile.runtime(self.model).metrics() if self.options is not None else None
        return {
            "seconds": spent,
            "steps": steps,
            "tokens": steps * self.sequences * length,
            "final": loss,
            "curve": curve,
            "metrics": metrics,
        }
