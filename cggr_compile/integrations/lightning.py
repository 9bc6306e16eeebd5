"""``lightning.Trainer(..., callbacks=[CGGRCallback()])``: Lightning's Trainer."""

from __future__ import annotations

from typing import Any

from cggr_compile.errors import OptionError
from cggr_compile.integrations.input_grads import InputGradsHooks
from cggr_compile.integrations.selective_training import SelectiveTraining

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    from pytorch_lightning import Callback, LightningModule, Trainer


class CGGRCallback(Callback):
    """Trains the model inside of a LightningModule with ``backend="cggr"``::

        trainer = lightning.Trainer(callbacks=[CGGRCallback()])
        trainer.fit(lit_module)  # whose training_step calls self.model(**batch).loss

    When fitting begins it compiles the inner model in place (whatever it is wrapped in), for training forwards alone.
    A batch behind which an optimizer steps ends a step of the runtime, whatever accumulates. Checkpoints hold the
    runtime's state, and resuming from them goes on from it. Every ``log_every_n_steps`` steps it logs ``cggr/ratio``,
    ``cggr/token_ratio``, ``cggr/labels_overflow``, ``cggr/context_overflow`` (see
    :meth:`cggr_compile.Runtime.metrics`), of this process, and ``cggr/level``: 2 for routed, 1 for loss,
    0 for dense.

    Args:
        module: name of the inner model, as ``named_modules()`` has it; it has to compute the loss. None for the only
            child of the LightningModule that is trained.
        **options: see :class:`cggr_compile.Options`, without ``advance``.

    Raises:
        ValueError: for an unknown option, or a value out of range; at ``fit``, where there is no such module.
    """

    def __init__(self, module: str | None = None, **options: Any) -> None:
        self._training = SelectiveTraining(options)
        self._name = module
        self._step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = self._find(pl_module)
        self._training.attach(module, before=InputGradsHooks(module))
        self._step = trainer.global_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step  # of a checkpoint

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # it accumulates
            return
        self._step = trainer.global_step
        self._training.step()
        if trainer.log_every_n_steps and self._step % trainer.log_every_n_steps == 0:
            self._training.log(lambda figures: self.log_dict(figures, on_epoch=False), numbers=True)

    def state_dict(self) -> dict[str, Any]:
        return self._training.state_dict() or {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._training.load_state_dict(state_dict or None)

    def _find(self, outer: LightningModule) -> Any:
        trained = {
            name: module for name, module in outer.named_children() if any(p.requires_grad for p in module.parameters())
        }
        if self._name is not None:
            for name, module in outer.named_modules():
                if name == self._name and module is not outer:
                    return module
            raise OptionError(
                f"module must name a part of {type(outer).__name__}, such as one of {sorted(trained)}, "
                f"got {self._name!r}"
            )
        if len(trained) != 1:
            raise OptionError(
                f"module must be given where {type(outer).__name__} has not one trained child: it has {sorted(trained)}"
            )
        return next(iter(trained.values()))
