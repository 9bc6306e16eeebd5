"""``TruncatedRouter``: a model's own first blocks, final norm and head, which tell how hard a token is."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cggr_compile import compat
from cggr_compile.options import OptionError, _check_choice, _check_integer

Architecture = Literal["auto", "llama", "gpt", "bert", "mamba", "passthrough"]

# how the path of the block list ends, by architecture
_BLOCKS: dict[str, tuple[str, ...]] = {
    "llama": ("model.layers",),
    "gpt": ("transformer.h", "gpt_neox.layers"),
    "bert": ("encoder.layer",),
    "mamba": ("backbone.layers",),
}
_NOT_FOR_ROUTERS = ("labels", "num_items_in_batch")
_CACHES = ("past_key_values", "cache_params")
# recording them would leave hooks on blocks that are the model's
_RECORDINGS = ("output_hidden_states", "output_attentions")


class TruncatedRouter(nn.Module):
    """The model cut off after ``num_layers`` blocks, run without gradient.

    It runs the model's own forward (embeddings, positions, masks, final norm, head) over a shorter list of blocks: the
    modules from the model down to that list are shallow copies, everything else *is* the model's. Nothing of it is
    registered here, so parameters(), state_dict() and to() do not see it, and it may be a part of the model itself.
    It runs in the mode (train or eval) the model is in. Build it after the last change to the model's modules
    (adapters, resized embeddings).

    Args:
        model: a language model that returns logits, an output with ``.logits``, or a tuple that begins with them.
        num_layers: blocks to keep, 1 to all of them.
        architecture: where the blocks are: ``llama`` model.layers; ``gpt`` transformer.h or gpt_neox.layers; ``bert``
            encoder.layer; ``mamba`` backbone.layers; ``auto`` whichever of these there is, else ``passthrough``: the
            whole model is the router.

    Attributes:
        passthrough: True where the router is the whole model.
        num_layers: the blocks kept; None if the model's blocks are not known.
        shifts_labels: whether logits at t are about the label at t + 1; False for masked language models.

    Raises:
        ValueError: for an unknown architecture, one the model does not have, or a number of blocks out of range.
    """

    def __init__(self, model: nn.Module, num_layers: int = 2, architecture: Architecture = "auto") -> None:
        super().__init__()
        _check_choice("architecture", architecture, get_args(Architecture))
        if not isinstance(model, nn.Module):
            raise OptionError(f"model must be a module, got {type(model).__name__}")
        _check_integer("num_layers", num_layers, 1)
        self.architecture, path, why = _locate(model, architecture)
        if why:
            warnings.warn(f"the router is the full model: {why}", stacklevel=2)
        self.num_layers = num_layers if path else None
        # in a tuple, out of sight of nn.Module
        self._model = (model,)
        self._view: tuple[nn.Module, ...] = (model,)
        self._copies: tuple[tuple[nn.Module, nn.Module], ...] = ()
        if path:
            blocks = model.get_submodule(path)
            assert isinstance(blocks, nn.ModuleList)
            if num_layers > len(blocks):
                raise OptionError(f"num_layers must be in [1, {len(blocks)}], the model's blocks, got {num_layers}")
            if num_layers < len(blocks):
                self._copies = _truncated(model, path, num_layers)
                self._view = (self._copies[0][0],)
        self.shifts_labels = not predicts_masked_tokens(model)
        self._fixed = {name: False for name in _RECORDINGS if _takes(model, name)}

    @property
    def passthrough(self) -> bool:
        return not self._copies

    @property
    def model(self) -> nn.Module:
        """The model that the router is a part of."""
        return self._model[0]

    @torch.no_grad()
    def forward(self, input_ids: Tensor, **kwargs: Any) -> Tensor:
        """Logits [B, S, V] of the truncated model.

        Args:
            input_ids: int64 [B, S].
            **kwargs: what the model's forward takes; labels are left out.

        Raises:
            ValueError: with a cache, which the router would write to.
        """
        for name in _CACHES:
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} must be None: the router would write to the model's cache")
        for copied, original in self._copies:
            if copied.training != original.training:
                copied.training = original.training
        kwargs = {name: value for name, value in kwargs.items() if name not in _NOT_FOR_ROUTERS}
        return logits_of(self._view[0](input_ids, **{**kwargs, **self._fixed}))

    def extra_repr(self) -> str:
        layers = "all blocks" if self.passthrough else f"{self.num_layers} blocks"
        return f"{type(self.model).__name__}, {layers}, architecture={self.architecture!r}"


def create_truncated_router(model: nn.Module, num_layers: int = 2) -> TruncatedRouter:
    """``TruncatedRouter(model, num_layers)``, its architecture found by itself.

    Args:
        model: a language model; its modules are used, not copied.
        num_layers: blocks that the router reads, from the first on.
    """
    return TruncatedRouter(model, num_layers)


def logits_of(output: Any) -> Tensor:
    """The logits of whatever a language model returns."""
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, (tuple, list)):
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise ValueError(f"the router must return logits, or an output that has them, got {type(output).__name__}")
    return logits


def _locate(model: nn.Module, architecture: str) -> tuple[str, str, str]:
    """(architecture, path of the block list, why the router has to be the full model)."""
    if architecture == "passthrough":
        return architecture, "", ""
    wanted = _BLOCKS if architecture == "auto" else {architecture: _BLOCKS[architecture]}
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    found = [
        (kind, name)
        for kind, endings in wanted.items()
        for name in lists
        if any(f".{name}".endswith(f".{ending}") for ending in endings)
    ]
    places = ", ".join(ending for endings in wanted.values() for ending in endings)
    if len(found) != 1:
        why = f"{type(model).__name__} has {len(found) or 'no'} block lists at {places}"
    elif patched := _patched(model, found[0][1]):
        why = f"the forward of {patched} is not its class's"
    else:
        return *found[0], ""
    if architecture != "auto":
        raise OptionError(f"architecture={architecture!r} does not fit ('auto' or 'passthrough' would): {why}")
    return "passthrough", "", why


def _patched(model: nn.Module, path: str) -> str:
    """A module above the block list with a forward set on the instance: a copy's would still run the original."""
    names = path.split(".")
    for depth in range(len(names)):
        module = model.get_submodule(".".join(names[:depth]))
        if "forward" in vars(module):
            return type(module).__name__
    return ""


def _truncated(model: nn.Module, path: str, num_layers: int) -> tuple[tuple[nn.Module, nn.Module], ...]:
    """(copy, original) of every module from the model to the list at ``path``, which gets shorter."""
    originals = [model]
    for name in path.split("."):
        originals.append(originals[-1].get_submodule(name))
    blocks = originals.pop()
    assert isinstance(blocks, nn.ModuleList)
    child: nn.Module = nn.ModuleList(list(blocks)[:num_layers])
    pairs = []
    for name, original in zip(reversed(path.split(".")), reversed(originals), strict=True):
        child = compat.with_child(original, name, child)
        pairs.append((child, original))
    return tuple(reversed(pairs))


def predicts_masked_tokens(model: nn.Module) -> bool:
    """As transformers tells its masked language models apart: by the loss, which it infers from the class's name."""
    return getattr(model, "loss_type", None) == "ForMaskedLM" or "MaskedLM" in type(model).__name__


def _takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward knows an argument, by name or as one of transformers'."""
    parameters = inspect.signature(model.forward).parameters
    passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return name in parameters or (passes_on and hasattr(getattr(model, "config", None), name))
