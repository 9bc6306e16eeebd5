"""Tiny models: transformers families, decoders of our own, and how a test compiles them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Compiling takes as long as the model is deep: two layers are a stack, what needs more says so.
VOCAB, HIDDEN, LAYERS, HEADS, SEQ = 128, 32, 2, 4, 16
IGNORE = -100

_SIZES = {
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
}
_LLAMA = dict(intermediate_size=64, num_attention_heads=HEADS, num_key_value_heads=2, **_SIZES)
_GPT2 = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 128}
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_FALCON = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
_GRANITE = {
    "embedding_multiplier": 2.0,
    "logits_scaling": 4.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
}

_DEEPSEEK = {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16} | {
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}

# name: (config class of transformers, its arguments)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA),
    "qwen2": ("Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3Config", dict(head_dim=8, **_LLAMA)),
    "gemma": ("GemmaConfig", dict(head_dim=8, **_LLAMA)),
    "gemma2": ("Gemma2Config", dict(head_dim=8, sliding_window=8, final_logit_softcapping=1.5, **_LLAMA)),
    "gemma2-eager": (
        "Gemma2Config",
        dict(head_dim=8, sliding_window=8, attn_implementation="eager", attn_logit_softcapping=2.0, **_LLAMA),
    ),
    "phi3": ("Phi3Config", dict(pad_token_id=0, **_LLAMA)),
    "olmo2": ("Olmo2Config", _LLAMA),
    "smollm3": ("SmolLM3Config", dict(pad_token_id=0, **_LLAMA)),
    "gpt2": ("GPT2Config", dict(**_GPT2, **_NO_DROPOUT)),
    "gpt_neox": ("GPTNeoXConfig", dict(num_attention_heads=HEADS, intermediate_size=64, **_SIZES)),
    "granite": ("GraniteConfig", dict(**_GRANITE, **_LLAMA)),
    "cohere": ("CohereConfig", dict(logit_scale=0.5, **_LLAMA)),
    "mistral": ("MistralConfig", dict(sliding_window=8, **_LLAMA)),
    "phi": ("PhiConfig", _LLAMA),
    "gemma3": ("Gemma3TextConfig", dict(head_dim=8, sliding_window=8, **_LLAMA)),
    "mixtral": ("MixtralConfig", dict(num_local_experts=4, **_LLAMA)),
    "qwen3_moe": ("Qwen3MoeConfig", dict(num_experts=4, num_experts_per_tok=3, moe_intermediate_size=24, **_LLAMA)),
    "olmoe": ("OlmoeConfig", dict(num_experts=5, num_experts_per_tok=2, eos_token_id=2, **_LLAMA)),
    "deepseek_v3": (
        "DeepseekV3Config",  # a dense layer, then one with experts
        dict(n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=24)
        | {**_LLAMA, **_DEEPSEEK, "num_hidden_layers": 2, "num_key_value_heads": HEADS},
    ),
    "gpt_oss": (
        "GptOssConfig",
        # two layers: rounding grows with them (in float64 the gradients of four agree to 4e-7)
        dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=8, pad_token_id=0)
        | {**_LLAMA, "num_hidden_layers": 2},
    ),
    "llama-eager": ("LlamaConfig", dict(attn_implementation="eager", **_LLAMA)),
}
# not promised to match, but never to be wrong
OTHER_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon": ("FalconConfig", _FALCON),
    "falcon-groups": ("FalconConfig", dict(new_decoder_architecture=True, num_kv_heads=2, **_FALCON)),
    "falcon-heads": ("FalconConfig", dict(multi_query=False, **_FALCON)),
    "gpt_bigcode": ("GPTBigCodeConfig", dict(**_GPT2, **_NO_DROPOUT)),
    "mpt": (
        "MptConfig",
        {"vocab_size": VOCAB, "d_model": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 64},
    ),
    "persimmon": (
        "PersimmonConfig",
        dict(num_attention_heads=HEADS, intermediate_size=64, pad_token_id=0, **_SIZES),
    ),
    # adds the routed experts' output in place
    "llama4": (
        "Llama4TextConfig",
        dict(num_local_experts=2, intermediate_size_mlp=64, head_dim=8, attention_chunk_size=8, **_LLAMA),
    ),
    # rotates by angles out of a table that is a buffer
    "gptj": ("GPTJConfig", dict(rotary_dim=4, **_GPT2, **_NO_DROPOUT)),
    "codegen": ("CodeGenConfig", dict(rotary_dim=4, **_GPT2, **_NO_DROPOUT)),
    "bloom": ("BloomConfig", {"vocab_size": VOCAB, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS}),
}


def family(name: str, **overrides: Any) -> nn.Module:
    """A tiny causal LM of one transformers family, in training mode, with weights that make every term matter."""
    import transformers

    kind, arguments = (FAMILIES | OTHER_FAMILIES)[name]
    arguments = {**arguments, **overrides}
    attention = arguments.pop("attn_implementation", None)  # None: what the model itself prefers
    config = getattr(transformers, kind)(**arguments)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    if name.startswith("gpt2"):
        model.loss_type = "ForCausalLM"  # left unset, transformers warns, which breaks the graph
    return randomise(model)


def randomise(model: nn.Module, seed: int = 1) -> nn.Module:
    """Larger weights than an initialisation's: attention far from uniform, biases and norms not trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * 0.2 if p.dim() > 1 else p + noise * 0.1)
    return model.train()


def make_batch(size: int = 2, seq: int = SEQ, *, ignored: bool = True, seed: int = 3) -> dict[str, Tensor]:
    """Token ids and labels; some labels are -100."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (size, seq), generator=generator)
    labels = ids.clone()
    if ignored:
        labels[0, : seq // 4] = IGNORE
        labels[-1, seq // 2] = IGNORE
    return {"input_ids": ids, "labels": labels}


def backend() -> Any:
    """The name where the package is installed, else the function behind it."""
    if "cggr" in torch._dynamo.list_backends(exclude_tags=()):
        return "cggr"
    from cggr_compile.backend import cggr

    return cggr


def slow_but(quick: Iterable[Any], names: Iterable[Any]) -> list[Any]:
    """Parameters of a test: of many variants alike ``make test`` runs the ``quick`` ones, ``make test-all`` all."""
    quick, names = list(quick), list(names)
    assert all(name in names for name in quick), f"not all of {quick} are among {names}"
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in names]


def compiled(target: Any, *, in_place: bool | None = None, **options: Any) -> Any:
    """``target`` (module or function) compiled by the backend under test; modules in place, unless told otherwise."""
    options = {"compiler": "eager", "fallback": "error", "launch_bound": "select", **options}
    if isinstance(target, nn.Module) and in_place is not False:
        target.compile(backend=backend(), options=options)
        return target
    return torch.compile(target, backend=backend(), options=options)


# ---------------------------------------------------------------------------------------------------------------
# Decoders without Hugging Face code. `kv_input` and `keys_values` do nothing: the reference replaces them.


def kv_input(x: Tensor) -> Tensor:
    return x


def keys_values(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return k, v


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def attend_bidirectional(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def attend_softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention as it is written by hand."""
    k, v = keys_values(k, v)
    size = q.shape[-2]
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(q.shape[-1]))
    causal = torch.tril(torch.ones(size, size, dtype=torch.bool, device=q.device))
    scores = scores.masked_fill(~(causal if mask is None else mask), float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


def index_rows(ids: Tensor, table: Tensor) -> Tensor:
    """The embedding written as indexing."""
    return table[ids]


def split_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Layer(nn.Module):
    def __init__(self, attend: Callable[..., Tensor], fused: bool) -> None:
        super().__init__()
        self.attend, self.fused = attend, fused
        self.ln_1, self.ln_2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        if fused:
            self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        else:
            self.q, self.k, self.v = (nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(3))
        self.out = nn.Linear(HIDDEN, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, 64), nn.Linear(64, HIDDEN)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.ln_1(x)
        if self.fused:
            q, k, v = self.qkv(kv_input(h)).split(HIDDEN, dim=-1)
        else:
            q, k, v = self.q(h), self.k(kv_input(h)), self.v(kv_input(h))
        y = self.attend(split_heads(q), split_heads(k), split_heads(v), mask)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.ln_2(x))))


class Decoder(nn.Module):
    """A decoder as people write it: learned positions, pre-norm blocks; returns logits.

    ``documents``: attention stays inside documents, which token 1 separates (a mask that depends on data).
    """

    def __init__(
        self,
        attend: Callable[..., Tensor] = attend_sdpa,
        *,
        fused: bool = True,
        tied: bool = True,
        bias: bool = False,
        documents: bool = False,
        layers: int | None = None,
    ) -> None:
        super().__init__()
        self.documents = documents
        self.wte, self.wpe = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(64, HIDDEN)
        self.blocks = nn.ModuleList(Layer(attend, fused) for _ in range(LAYERS if layers is None else layers))
        self.ln_f = nn.LayerNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=bias)
        if tied:
            self.lm_head.weight = self.wte.weight
        randomise(self)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        mask = None
        if self.documents:
            document = (ids == 1).cumsum(-1)
            same = document[:, None, :, None] == document[:, None, None, :]
            mask = same & torch.tril(torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device))
        for block in self.blocks:
            x = block(x, mask)
        return self.lm_head(self.ln_f(x))


class NanoGPT(Decoder):
    """Targets come shifted, as in nanoGPT, with ignore_index -1; returns (logits, loss)."""

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Any:
        logits = super().forward(ids)
        if targets is None:
            return logits
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


class SlicedLoss(Decoder):
    """``logits[:, :-1]`` against ``labels[:, 1:]`` in the forward; returns the loss alone."""

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = super().forward(ids)
        if labels is None:
            return logits
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))


class Output(NamedTuple):
    loss: Tensor | None
    logits: Tensor


class PlainLM(Decoder):
    """One layer, called as transformers' models are: where the model is no subject, half the time of a Llama."""

    def __init__(self) -> None:
        super().__init__(fused=False, tied=False, layers=1)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> Any:
        logits = super().forward(input_ids)
        if labels is None:
            return Output(None, logits)
        target = F.pad(labels, (0, 1), value=IGNORE)[:, 1:].reshape(-1)
        reduction = "mean" if num_items_in_batch is None else "sum"
        loss = F.cross_entropy(logits.view(-1, VOCAB).float(), target, reduction=reduction)
        return Output(loss if num_items_in_batch is None else loss / num_items_in_batch, logits)


class Functional:
    """A decoder without any nn.Module: tensors in a dict, ``x @ w``, hand-written RMSNorm, a loop over layers."""

    def __init__(
        self, attend: Callable[..., Tensor] = attend_sdpa, lookup: Callable[[Tensor, Tensor], Tensor] | None = None
    ) -> None:
        self.attend, self.lookup = attend, lookup or F.embedding
        generator = torch.Generator().manual_seed(5)

        def weight(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator) * 0.2).requires_grad_()

        def scale() -> Tensor:
            return (1 + 0.1 * torch.randn(HIDDEN, generator=generator)).requires_grad_()

        self.params = {"embed": weight(VOCAB, HIDDEN), "positions": weight(64, HIDDEN)}
        for i in range(LAYERS):
            self.params |= {f"{i}.{n}": weight(HIDDEN, HIDDEN) for n in ("wq", "wk", "wv", "wo")}
            self.params |= {f"{i}.norm1": scale(), f"{i}.norm2": scale()}
            self.params |= {f"{i}.up": weight(HIDDEN, 64), f"{i}.down": weight(64, HIDDEN)}
        self.params |= {"norm": scale(), "head": weight(HIDDEN, VOCAB)}

    def __call__(self, params: dict[str, Tensor], ids: Tensor) -> Tensor:
        def norm(x: Tensor, weight: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight

        x = self.lookup(ids, params["embed"]) + params["positions"][: ids.shape[1]]
        for i in range(LAYERS):
            h = norm(x, params[f"{i}.norm1"])
            q, k, v = h @ params[f"{i}.wq"], kv_input(h) @ params[f"{i}.wk"], kv_input(h) @ params[f"{i}.wv"]
            y = self.attend(split_heads(q), split_heads(k), split_heads(v))
            x = x + y.transpose(1, 2).flatten(2) @ params[f"{i}.wo"]
            x = x + F.silu(norm(x, params[f"{i}.norm2"]) @ params[f"{i}.up"]) @ params[f"{i}.down"]
        return norm(x, params["norm"]) @ params["head"]
