"""TRL's fused head in the compiled graph: per-token log-probabilities with sizes that depend on shapes alone."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from cggr_compile.modules.token_log_probs import TokenLogProbs, token_log_probs

# TRL's names of per-token values: ours, and whether TRL gives it a gradient
VALUES = {
    "log_probs": ("log_prob", True),
    "entropy": ("entropy", True),
    "log_sum_sq_probs": ("log_sum_squares", False),
    "mean_logits": ("mean_logit", False),
    "is_top1": ("top1_hit", False),
}


@dataclass(frozen=True)
class FusedHead:
    """What TRL's ``add_fused_lm_head`` was called with, and what it read of the model's configuration.

    Attributes:
        forward: the forward that it has put into the model.
        outputs: TRL's names of the values wanted besides ``log_probs``.
        router_logits: whether the model is asked for these by its configuration.
    """

    forward: Callable[..., Any]
    temperature: float
    cast_lm_head_to_fp32: bool
    outputs: tuple[str, ...]
    logit_scale: float
    final_logit_softcapping: float | None
    backbone_attr: str
    router_logits: bool

    @staticmethod
    def of(forward: Any) -> FusedHead | None:
        """Of a model's forward; None if that is none of TRL's.

        Raises:
            KeyError: if this version of TRL writes it otherwise.
        """
        function = getattr(forward, "__func__", forward)
        if not isinstance(function, FunctionType) or function.__code__.co_name != "_fused_forward":
            return None
        known = inspect.getclosurevars(function).nonlocals
        return FusedHead(
            forward=forward,
            router_logits=bool(getattr(known["text_config"], "output_router_logits", False)),
            **{name: known[name] for name in FusedHead.__annotations__ if name not in ("forward", "router_logits")},
        )


def find_fused_head(model: Any) -> FusedHead | None:
    """Of a transformers model without adapters, Accelerate's mixed precision around it or not.

    Raises:
        KeyError: as :meth:`FusedHead.of`.
    """
    own = vars(model)
    return FusedHead.of(own.get("_original_forward", own.get("forward")))


def replace_fused_head(model: Any, head: FusedHead, accelerator: Any) -> None:
    """Let a training forward with ``fused_lm_head=True`` be ours: same arguments, same output.

    TRL's own picks the labelled positions out of the hidden states, a size that depends on the data, and runs an
    autograd function, which end the graph. It stays for all other calls, and where router logits are asked for.
    """
    forward = _forward_of(type(model).forward, head)
    if "_original_forward" in vars(model):  # Accelerate has wrapped TRL's
        from accelerate.utils import convert_outputs_to_fp32
        from accelerate.utils.modeling import get_mixed_precision_context_manager

        autocast = get_mixed_precision_context_manager(accelerator.native_amp, accelerator.autocast_handler)
        forward = convert_outputs_to_fp32(autocast(forward))
    model.forward = MethodType(forward, model)


def _forward_of(plain: Callable[..., Any], head: FusedHead) -> Callable[..., Any]:
    from trl.trainer.utils import FusedCausalLMOutput

    wanted = tuple(dict.fromkeys(["log_probs", *head.outputs]))

    @functools.wraps(plain)  # generate looks at the signature
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        routers = kwargs.get("output_router_logits", head.router_logits)
        if not (fused_lm_head and self.training and torch.is_grad_enabled()) or routers:
            given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            given = {name: value for name, value in given.items() if value is not None}
            return head.forward(*args, fused_lm_head=fused_lm_head, **given, **kwargs)
        kwargs["use_cache"] = False
        hidden = getattr(self, head.backbone_attr)(*args, **kwargs).last_hidden_state
        if shift_labels is None:
            assert labels is not None
            hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
        # looked up at every call: PEFT and FSDP exchange it
        found = _values(self.get_output_embeddings(), hidden, shift_labels, head, wanted)
        values = {}
        for name in wanted:
            value: Any = getattr(found, VALUES[name][0])
            values[name] = value if VALUES[name][1] else value.detach()
        if "is_top1" in values:
            values["is_top1"] = values["is_top1"] > 0
        mask = shift_labels != -100
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return FusedCausalLMOutput(loss=-values["log_probs"].sum() / count, label_mask=mask, **values)

    forward.cggr_fused_head = head  # type: ignore[attr-defined]
    return forward


def _values(module: Any, hidden: Tensor, labels: Tensor, head: FusedHead, wanted: tuple[str, ...]) -> TokenLogProbs:
    weight, bias = module.weight, module.bias
    if isinstance(weight, DTensor):
        weight, bias = weight.full_tensor(), None if bias is None else bias.full_tensor()
    context: AbstractContextManager[Any] = nullcontext()
    if head.cast_lm_head_to_fp32:
        hidden, weight, bias = hidden.float(), weight.float(), None if bias is None else bias.float()
        context = torch.autocast(hidden.device.type, enabled=False)
    with context:
        return token_log_probs(
            hidden,
            weight,
            labels,
            bias=bias,
            temperature=head.temperature,
            softcap=head.final_logit_softcapping or 0.0,
            scale=head.logit_scale,
            outputs=[VALUES[name][0] for name in wanted],
        )
