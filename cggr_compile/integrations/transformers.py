"""``Trainer(..., callbacks=[CGGRCallback()])``: transformers' Trainer, and those derived from it."""

from __future__ import annotations

import json
import sys
from types import FrameType
from typing import Any

from torch.nn import DataParallel, Module
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from cggr_compile.errors import OptionError
from cggr_compile.integrations import label_smoothing
from cggr_compile.integrations.fused_head import find_fused_head, replace_fused_head
from cggr_compile.integrations.input_grads import InputGradsHooks
from cggr_compile.integrations.selective_training import SelectiveTraining
from cggr_compile.integrations.top_entropy import KeptTokens, kept_by_entropy

STATE = "runtime_state"


class CGGRCallback(TrainerCallback, ExportableState):
    """Trains a Trainer's model with ``backend="cggr"``::

        trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[CGGRCallback()])

    When training begins it compiles the model in place (adapters included, whatever it is wrapped in), for training
    forwards alone: evaluation and ``generate`` run as they are. One step of the optimizer is one step of the runtime,
    whatever accumulates. Checkpoints of the trainer hold the runtime's state, and resuming from them goes on from it.
    Of GRPO's ``top_entropy_quantile`` the rows are those that it keeps (``top_entropy.py`` says when and with which
    options); ``cggr/top_entropy_overflow`` counts the tokens that it kept without a row, in all steps so far.

    With its metrics the trainer logs ``cggr/ratio``, ``cggr/token_ratio``, ``cggr/level``, ``cggr/labels_overflow``
    and ``cggr/context_overflow`` (see :meth:`cggr_compile.Runtime.metrics`), each process its own.

    Where the model cannot be trained so, a warning says why once and training goes on as it is, or raises OptionError
    (a ValueError) under ``fallback="error"``.

    Args:
        **options: see :class:`cggr_compile.Options`, without ``advance``.

    Raises:
        ValueError: for an unknown option, or a value out of range.
    """

    def __init__(self, **options: Any) -> None:
        self._training = SelectiveTraining(options)
        self._smoothing: label_smoothing.ModelLabelSmoothing | None = None
        self._kept: KeptTokens | None = None
        self._lost: list[str] = []
        self.runtime_state: dict[str, Any] | None = None  # of a checkpoint, set by the trainer where it restores it

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = _calling_trainer()
        _put_first(self, trainer)
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if isinstance(saved, list):  # of several callbacks
            saved = saved[0]
        resumed = self.runtime_state or saved.get("attributes", {}).get(STATE)
        self.runtime_state = None
        if self._lost:
            raise OptionError(
                f"restore_callback_states_from_checkpoint=True makes the callback anew, and a checkpoint cannot hold "
                f"the options {self._lost}: set it to False, the callback restores its state in any case"
            )
        if resumed is not None and state.global_step > 0:
            self._training.load_state_dict(resumed)
        self._attach(trainer, args)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:  # of an evaluation, or the summary
            return
        histories = [logs, *state.log_history[-1:]]  # which got a copy of logs before this
        kept = {} if self._kept is None else {"cggr/top_entropy_overflow": self._kept.missed()}
        self._training.log(lambda figures: [each.update(figures) for each in histories], kept)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end_smoothing()

    def state(self) -> dict[str, Any]:
        """What the trainer writes into ``trainer_state.json`` of a checkpoint."""
        given = self._training.given
        options = {name: value for name, value in given.items() if _is_json(value)}
        lost = [name for name in given if name not in options]
        return {"args": options, "attributes": {STATE: self._training.state_dict(), "_lost": lost}}

    def _attach(self, trainer: Trainer, args: Any) -> None:
        self._end_smoothing()
        module = _unwrapped(trainer)
        head = find_fused_head(_base(module)) if not trainer.is_deepspeed_enabled else None
        defaults = {"padding": "any"} if hasattr(args, "max_completion_length") else {}  # prompts padded on the left
        if (kept := kept_by_entropy(trainer)) is not None and head is not None:
            defaults |= kept
        if (reason := _obstacle(trainer, module)) or not self._training.attach(
            module,
            static_sizes=args.neftune_noise_alpha is not None,  # its noise reads the size, which breaks a dynamic graph
            defaults=defaults,
            before=InputGradsHooks(module),
        ):
            if reason:
                self._training.refuse(reason)
            return
        base = _base(module)
        if trainer.label_smoother is not None:
            self._smoothing = label_smoothing.ModelLabelSmoothing(trainer, base)
        if head is not None:
            replace_fused_head(base, head, trainer.accelerator)
        if kept is not None and head is not None and self._kept is None:
            self._kept = KeptTokens(trainer, self._training)

    def _end_smoothing(self) -> None:
        if self._smoothing is not None:
            self._smoothing.end()
            self._smoothing = None


def _calling_trainer() -> Trainer:
    """The trainer that sent the event: events do not carry it."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if isinstance(found := frame.f_locals.get("self"), Trainer):
            return found
        frame = frame.f_back
    raise OptionError("CGGRCallback must be given to a transformers.Trainer, as callbacks=[CGGRCallback()]")


def _put_first(callback: CGGRCallback, trainer: Trainer) -> None:
    """What reports the metrics comes behind what adds to them."""
    callbacks = trainer.callback_handler.callbacks
    # while a list is gone through, moving the element under way to the front skips none and repeats none
    callbacks.insert(0, callbacks.pop(callbacks.index(callback)))


def _unwrapped(trainer: Trainer) -> Module:
    return trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_torch_compile=True)  # type: ignore[no-any-return]


def _base(model: Any) -> Any:
    """A transformers model without its adapters."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _obstacle(trainer: Any, module: Module) -> str:
    """Why a trainer's loss, or its way of running the model, cannot be rewritten; empty if it may."""
    if isinstance(trainer.model_wrapped, DataParallel):
        return "DataParallel runs copies of the model; start one process per GPU (torchrun, accelerate launch)"
    if callable(trainer.compute_loss_func):  # TRL's set a string, a flag for transformers before 5.19
        return (
            "compute_loss_func takes the labels away from the model and computes the loss outside of the compiled "
            "graph; compute it in the model (model.loss_function = ...)"
        )
    if any(kind.__name__ == "DistillationTrainer" for kind in type(trainer).__mro__):  # TRL's
        return (
            f"{type(trainer).__name__} computes the loss in place of the model's forward, by an autograd function over "
            "pieces of both models' logits, which no graph can hold"
        )
    base = _base(module)
    if type(base).__name__.endswith("ForSequenceClassification"):
        return (
            f"{type(base).__name__} computes values of whole sequences, at their last token, as reward models and "
            "classifiers do: there are no losses of tokens to select among"
        )
    return label_smoothing.obstacle(trainer, base) if trainer.label_smoother is not None else ""


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
