"""Tiny transformers models of every style that the router knows."""

from __future__ import annotations

from typing import Any

import models
import torch
from torch import nn

_BERT = {
    "vocab_size": models.VOCAB,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_MAMBA = {"vocab_size": models.VOCAB, "hidden_size": 32, "state_size": 4, "expand": 2, "use_mambapy": False}

# name: architecture, path of the blocks, transformers class, configuration, its name for the number of blocks
STYLES: dict[str, tuple[str, str, str, dict[str, Any], str]] = {
    "llama": ("llama", "model.layers", "LlamaForCausalLM", models.FAMILIES["llama"][1], "num_hidden_layers"),
    "gemma2": ("llama", "model.layers", "Gemma2ForCausalLM", models.FAMILIES["gemma2"][1], "num_hidden_layers"),
    "gpt2": ("gpt", "transformer.h", "GPT2LMHeadModel", models.FAMILIES["gpt2"][1], "n_layer"),
    "falcon": (
        "gpt",
        "transformer.h",
        "FalconForCausalLM",
        {**models.OTHER_FAMILIES["falcon"][1], "hidden_dropout": 0.0},
        "num_hidden_layers",
    ),
    "gpt_neox": (
        "gpt",
        "gpt_neox.layers",
        "GPTNeoXForCausalLM",
        {**models.FAMILIES["gpt_neox"][1], "hidden_dropout": 0.0},
        "num_hidden_layers",
    ),
    "bert": ("bert", "bert.encoder.layer", "BertForMaskedLM", _BERT, "num_hidden_layers"),
    "roberta": ("bert", "roberta.encoder.layer", "RobertaForMaskedLM", _BERT, "num_hidden_layers"),
    "mamba": ("mamba", "backbone.layers", "MambaForCausalLM", _MAMBA, "num_hidden_layers"),
}


def style(name: str, layers: int = 4, **overrides: Any) -> nn.Module:
    """A model of this style, in training mode, with weights that make every term matter."""
    import transformers

    _, _, kind, arguments, count = STYLES[name]
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    return models.randomise(cls(cls.config_class(**{**arguments, count: layers, **overrides})))


def ids(size: int = 2, seq: int = 12, seed: int = 3) -> torch.Tensor:
    return torch.randint(5, models.VOCAB, (size, seq), generator=torch.Generator().manual_seed(seed))
