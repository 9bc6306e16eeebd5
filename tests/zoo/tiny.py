"""A tiny model of a type of transformers: its own configuration class, with the sizes of ``sizes.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from zoo.sizes import DEPTH, FAMILIES, IMAGES, LAYERS, SIZES, VOCAB

KINDS = {"causal": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM", "vision": "AutoModelForImageTextToText"}
BATCH, SEQ = 2, 16
# lists with one entry for each layer: kinds of layers, of which each that occurs is kept
_PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")


def causal_types() -> list[str]:
    """Every type that the installed transformers has a causal language model of."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def model_of(name: str, layers: int = LAYERS) -> nn.Module:
    """The model ``type`` or ``type:kind``, in training mode and float32, without dropout.

    Args:
        layers: how many; more where it has more kinds of them, or sizes of its own that say so.

    Raises:
        Exception: whatever transformers raises, where the sizes do not fit the type.
    """
    import transformers

    kind = name.partition(":")[2] or "causal"
    torch.manual_seed(0)
    return getattr(transformers, KINDS[kind]).from_config(config_of(name, layers)).float().train()


def config_of(name: str, layers: int = LAYERS) -> Any:
    """The configuration of :func:`model_of`."""
    from transformers import AutoConfig

    model_type, _, kind = name.partition(":")
    default = AutoConfig.for_model(model_type)
    family = FAMILIES.get(model_type, {}) | FAMILIES.get(name, {})
    return type(default)(**_small(default, family, layers, decodes=kind != "masked"))


def _small(default: Any, family: dict[str, Any], layers: int, decodes: bool) -> dict[str, Any]:
    """Arguments of ``default``'s class: what is small of what it has, and the family's own."""
    given: dict[str, Any] = {}
    sizes = SIZES | dict.fromkeys(DEPTH, layers)
    sizes |= {stored: sizes[name] for name, stored in default.attribute_map.items() if name in sizes}
    parts = {key: getattr(default, key) for key in default.sub_configs if getattr(default, key, None) is not None}
    values = default.to_dict() | parts
    for key, value in values.items():
        if isinstance(slot := getattr(type(default), key, None), property) and slot.fset is None:
            continue  # made of others
        if key in parts:
            own = FAMILIES.get(value.model_type, {}) | family.get(key, {})
            named = {"model_type": value.model_type} if value.model_type else {}
            given[key] = {**named, **_small(value, own, layers, decodes)}
        elif key in sizes and (value is not None or key == "head_dim"):
            given[key] = sizes[key]
        elif key in _PER_LAYER and isinstance(value, (list, tuple)) and value:
            kinds = list(dict.fromkeys(value))
            given[key] = (kinds * layers)[: max(layers, len(kinds))]
        elif ("drop" in key or "jitter" in key) and isinstance(value, float):
            given[key] = 0.0
        elif key == "is_decoder":
            given[key] = decodes
    for key, value in family.items():
        if key not in parts:
            given[key] = value
    return given


def batch_of(name: str) -> dict[str, torch.Tensor]:
    """Token ids and labels [2, 16] of the model ``name``, where it sees images one for each sequence.

    Labels are the ids; those of a few tokens are -100, for a masked model those of most.
    """
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(8, VOCAB - 8, (BATCH, SEQ), generator=generator)
    images = IMAGES.get(name)
    if images is not None and images.tokens:
        ids[:, 1 : 1 + images.tokens] = images.token
    labels = ids.clone()
    labels[0, :5] = -100
    if images is not None:
        labels[:, : 1 + images.tokens] = -100
    if name.endswith(":masked"):
        labels[torch.rand(labels.shape, generator=generator) < 0.7] = -100
    batch = {"input_ids": ids, "labels": labels}
    if images is not None:
        batch["pixel_values"] = torch.randn(images.pixels, generator=generator)
        batch |= {key: torch.tensor(value) for key, value in images.beside.items()}
        batch |= {key: (ids == images.token).long() for key in images.marks}
    return batch
