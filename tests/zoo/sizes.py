"""Sizes of tiny models, by the names that configurations have for them; and what a type needs besides."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VOCAB = 256
LAYERS = 2
IMAGE_TOKEN = 7

_WIDTH = dict.fromkeys(
    ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size", "lru_width", "dim"), 64
)
_INNER = dict.fromkeys(
    ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim", "ffn_hidden_size", "feed_forward_size"), 96
) | dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "feed_forward_hidden_size"), 96)
# as many as the model is to have
DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_ENCODER = {"encoder_layers": 1, "num_encoder_layers": 1, "depth": 2}
_HEADS = dict.fromkeys(
    ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads"), 4
) | {"num_key_value_heads": 2, "head_dim": 16, "num_attention_groups": 2, "attention_head_size": 16, "d_kv": 16}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
_POSITIONS = dict.fromkeys(
    ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "n_ctx"), 128
) | dict.fromkeys(("sliding_window", "attention_window_size", "window_size"), 8)
_EXPERTS = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4) | {
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
_SCANS = {
    "state_size": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_expand": 2,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "n_groups": 1,
    "expand": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# what a value of every such name is made, in every configuration that has it
SIZES: dict[str, Any] = {
    **_WIDTH,
    **_INNER,
    **_ENCODER,
    **_HEADS,
    **_LATENT,
    **_POSITIONS,
    **_EXPERTS,
    **_SCANS,
    **_TOKENS,
    "rotary_dim": 8,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "num_nextn_predict_layers": 0,
    "layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "use_cache": False,
}

_MLA = {"num_key_value_heads": 4, "head_dim": 8}  # the head is the rotary part of it
_INDEXED = {**_MLA, "index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
_ROTARY = {"rope_theta": 10000.0, "rope_type": "default"}

# type, or type:kind: its own arguments; those of a part stand under the part's name
FAMILIES: dict[str, dict[str, Any]] = {
    "axk1": _MLA,
    "axk2": _INDEXED,
    "blt": {
        "encoder_hash_byte_group_size": [3],
        "encoder_hash_byte_group_vocab": 64,
        "local_attention_window_len": 8,
        "cross_attn_k": 1,
        "encoder_config": {"hidden_size_global": 64, "cross_attn_k": 1},
        "decoder_config": {"hidden_size_global": 64, "cross_attn_k": 1},
    },
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"], "mlp_layer_types": ["dense", "sparse"]},
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 2},
    "cpmant": {"prompt_length": 4},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2},
    },
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {**_ROTARY, "mrope_section": [4, 2, 2]}},
        "layer_types": ["full_attention"] * 2,
    },
    "deepseek_v2": {**_MLA, "num_experts_per_tok": 2},
    "deepseek_v3": _MLA,
    "deepseek_v32": _INDEXED,
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note_text": {
        **_INDEXED,
        "head_dim": 16,
        "layer_types": ["indexed_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 16,
        "moe_shared_expert_intermediate_size": 32,
    },
    "dots3_note": {
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "dory": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        **dict.fromkeys(("n_input_layers", "n_recurrent_layers", "n_output_layers"), 1),
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 0, "num_hidden_layers": 2, "intermediate_size": [96, 96]},
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _INDEXED,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {**_MLA, "expert_ffn_hidden_size": 32, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "chunk_size": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
        "ple_embed_dim": 16,
        "ngram_vocab_size_base": 64,
        "heads_per_ngram": 2,
        "split_ngram_parts": 1,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_embds": False,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 2,
        "attn_layers": ["local", "lsh"],
        "hash_seed": 1,
    },
    "xmod": {"default_language": "en_XX"},
    "youtu": _MLA,
    "zamba": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
        "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "git": {"vision_config": {"image_size": 16, "patch_size": 8}},
    "qwen2_5_vl:vision": {
        "image_token_id": IMAGE_TOKEN,
        "text_config": {"rope_parameters": {**_ROTARY, "mrope_section": [4, 2, 2]}},
        "vision_config": {"patch_size": 4, "out_hidden_size": 64, "fullatt_block_indexes": [1], "window_size": 16},
    },
    "qwen3_vl:vision": {
        "image_token_id": IMAGE_TOKEN,
        "text_config": {"rope_parameters": {**_ROTARY, "mrope_section": [4, 2, 2]}},
        "vision_config": {
            "patch_size": 4,
            "out_hidden_size": 64,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
    },
    "llava:vision": {
        "image_token_index": IMAGE_TOKEN,
        "image_seq_length": 4,
        "vision_config": {"image_size": 16, "patch_size": 8},
    },
    "gemma3:vision": {
        "image_token_index": IMAGE_TOKEN,
        "mm_tokens_per_image": 4,
        "vision_config": {"image_size": 16, "patch_size": 4, "vision_use_head": False},
    },
    "smolvlm:vision": {"image_token_id": IMAGE_TOKEN, "vision_config": {"image_size": 16, "patch_size": 4}},
}


@dataclass(frozen=True)
class Images:
    """One image for each of two sequences.

    Attributes:
        tokens: how many positions of a sequence an image takes. token: what their id is.
        pixels: the shape of ``pixel_values``. beside: further inputs. marks: those that are 1 at the image's tokens.
    """

    tokens: int
    pixels: tuple[int, ...]
    beside: dict[str, Any] = field(default_factory=dict)
    marks: tuple[str, ...] = ()
    token: int = IMAGE_TOKEN


_QWEN = Images(4, (32, 3 * 2 * 4 * 4), {"image_grid_thw": [[1, 4, 4]] * 2}, ("mm_token_type_ids",))
IMAGES = {
    "git": Images(0, (2, 3, 16, 16)),
    "qwen2_5_vl:vision": _QWEN,
    "qwen3_vl:vision": _QWEN,
    "llava:vision": Images(4, (2, 3, 16, 16)),
    "gemma3:vision": Images(4, (2, 3, 16, 16), marks=("token_type_ids",)),
    "smolvlm:vision": Images(4, (2, 1, 3, 16, 16)),
}
# beside the causal types
OTHERS = (
    *(f"{name}:masked" for name in ("albert", "bert", "distilbert", "electra", "modernbert", "roberta")),
    *(name for name in IMAGES if name.endswith(":vision")),
)
