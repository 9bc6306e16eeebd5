"""What the benchmarks run: Llama models and ones with experts, random weights, batches of random tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM


def _llama(vocab: int, hidden: int, layers: int, heads: tuple[int, int], mlp: int, *, tied: bool) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": mlp,
        "tie_word_embeddings": tied,
    }


# The dimensions of SmolLM-135M and -360M, of Llama-3.2-1B and of Llama-3-8B; the others are ours.
MODELS = {
    "tiny": _llama(256, 64, 2, (4, 2), 128, tied=True),
    "cpu": _llama(8192, 384, 8, (6, 2), 1024, tied=False),
    "135m": _llama(49152, 576, 30, (9, 3), 1536, tied=True),
    "360m": _llama(49152, 960, 32, (15, 5), 2560, tied=True),
    "1b": _llama(128256, 2048, 16, (32, 8), 8192, tied=True),
    "8b": _llama(128256, 4096, 32, (32, 8), 14336, tied=False),
}


# Layers of Mixtral 8x7B (6 of its 32) and of Qwen3-30B-A3B (12 of its 48), both with their embeddings and heads.
EXPERTS = {
    "tiny-mixtral": {"model_type": "mixtral", **_llama(256, 64, 2, (4, 2), 32, tied=False), "num_local_experts": 4},
    "tiny-qwen3-moe": {
        "model_type": "qwen3_moe",
        **_llama(256, 64, 2, (4, 2), 64, tied=False),
        "head_dim": 32,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 4,
    },
    "mixtral": {"model_type": "mixtral", **_llama(32000, 4096, 6, (32, 8), 14336, tied=False)},
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        **_llama(151936, 2048, 12, (32, 4), 6144, tied=False),
        "head_dim": 128,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    },
}


@dataclass(frozen=True)
class Shape:
    """A model and a batch of ``batch`` sequences of ``length`` tokens."""

    model: str
    batch: int
    length: int
    device: str
    dtype: str


SHAPES = {
    "tiny": Shape("tiny", 2, 64, "cpu", "float32"),
    "cpu-384": Shape("cpu", 4, 512, "cpu", "float32"),
    "135m-16x2048": Shape("135m", 16, 2048, "cuda", "bfloat16"),
    "360m-8x2048": Shape("360m", 8, 2048, "cuda", "bfloat16"),
    "1b-8x1024": Shape("1b", 8, 1024, "cuda", "bfloat16"),
    "1b-4x4096": Shape("1b", 4, 4096, "cuda", "bfloat16"),
    "135m-16x512": Shape("135m", 16, 512, "cuda", "bfloat16"),
    "135m-4x512": Shape("135m", 4, 512, "cuda", "bfloat16"),
    "135m-8x2048": Shape("135m", 8, 2048, "cuda", "bfloat16"),
    "8b-4x2048": Shape("8b", 4, 2048, "cuda", "bfloat16"),
    "tiny-mixtral": Shape("tiny-mixtral", 2, 64, "cpu", "float32"),
    "tiny-qwen3-moe": Shape("tiny-qwen3-moe", 2, 64, "cpu", "float32"),
    "mixtral-4x2048": Shape("mixtral", 4, 2048, "cuda", "bfloat16"),
    "qwen3-moe-8x2048": Shape("qwen3-moe", 8, 2048, "cuda", "bfloat16"),
}


def build_model(shape: Shape, *, device: str, dtype: torch.dtype, layers: int | None = None) -> LlamaForCausalLM:
    """The shape's model in training mode; the same weights at every call. ``layers`` makes it shorter."""
    arguments = {"model_type": "llama", **(MODELS | EXPERTS)[shape.model]}
    if layers is not None:
        arguments["num_hidden_layers"] = layers
    # no cache of keys and values: no trainer asks for one, and it would be an output that carries gradient
    kind = arguments.pop("model_type")
    config = AutoConfig.for_model(kind, **arguments, max_position_embeddings=shape.length, use_cache=False)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def make_batch(shape: Shape, *, device: str, labelled: int | None = None) -> tuple[Tensor, Tensor]:
    """Token ids and labels, int64 [batch, length] each: equal, but two tensors.

    ``labelled``: only the last so many tokens of each sequence, at least one, have a label, as an answer behind its
    prompt; the others have -100.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint((MODELS | EXPERTS)[shape.model]["vocab_size"], (shape.batch, shape.length), generator=generator)
    labels = ids.clone()
    if labelled is not None:
        labels[:, :-labelled] = -100
    return ids.to(device), labels.to(device)
