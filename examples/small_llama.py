"""Small Llamas with random weights, which train on a CPU within minutes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Size:
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int


SIZES = {
    "nano": Size(512, 64, 2, 2, 1),
    "tiny": Size(2048, 128, 4, 4, 2),
    "mini": Size(2048, 192, 4, 3, 1),
    "small": Size(4096, 256, 6, 4, 2),
    "base": Size(8192, 512, 8, 8, 4),
    "135m": Size(8192, 576, 30, 9, 3),
}


def build_model(size: Size, length: int, seed: int) -> LlamaForCausalLM:
    """A Llama for sequences of ``length`` tokens: the same weights at every call with the same seed."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=length,
        use_cache=False,
    )
    return LlamaForCausalLM(config)
