"""Models without a stack of decoder blocks: recurrent, convolutional, state spaces, encoders, encoder-decoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from models import HEADS, HIDDEN, IGNORE, VOCAB, Output, make_batch, randomise
from reference import eager_call, shift
from torch import Tensor, nn

SEQ = 8  # recurrences are traced position by position


class Convolution(nn.Module):
    """Sees three positions, those before its own or around it."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.causal, self.conv = causal, nn.Conv1d(HIDDEN, HIDDEN, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x.transpose(1, 2), (2, 0) if self.causal else (1, 1))).transpose(1, 2)


class Recurrence(nn.Module):
    """h[t] = a h[t - 1] + x[t], gated: a state space model in small."""

    def __init__(self) -> None:
        super().__init__()
        self.decay, self.gate, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        decay, state, states = torch.sigmoid(self.decay(x)), torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + x[:, t]
            states.append(state)
        return self.out(torch.stack(states, 1) * F.silu(self.gate(x)))


class Gru(nn.GRU):
    def __init__(self) -> None:
        super().__init__(HIDDEN, HIDDEN, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x)[0]


class Fourier(nn.Module):
    """What FNet has in place of attention."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft2(x, dim=(1, 2)).real / 8


class Mixed(nn.Module):
    """Embedding, something that mixes positions, an MLP, head; called as transformers' models are."""

    def __init__(self, mixer: nn.Module, causal: bool = True) -> None:
        super().__init__()
        self.causal, self.wte, self.mixer = causal, nn.Embedding(VOCAB, HIDDEN), mixer
        self.up, self.down = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)
        self.ln_1, self.ln_2, self.ln_f = (nn.LayerNorm(HIDDEN) for _ in range(3))
        self.lm_head = nn.Linear(HIDDEN, VOCAB)
        randomise(self)

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.wte(ids)
        x = x + self.mixer(self.ln_1(x))
        return self.ln_f(x + self.down(F.gelu(self.up(self.ln_2(x)))))

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.lm_head(self.hidden(input_ids))
        if labels is None:
            return Output(None, logits)
        target = F.pad(labels, (0, 1), value=IGNORE)[:, 1:] if self.causal else labels
        return Output(F.cross_entropy(logits.view(-1, VOCAB), target.reshape(-1)), logits)


def _of_transformers(auto: str, name: str, **config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        torch.manual_seed(0)
        settings = transformers.AutoConfig.for_model(name, vocab_size=VOCAB, **config)
        return randomise(getattr(transformers, auto).from_config(settings))

    return make


_ENCODER = {"hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": HEADS}
_ENCODER |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0}
_STATES = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "state_size": 4, "use_cache": False, "pad_token_id": 0}
_BART = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in (("layers", 1), ("ffn_dim", 64))}
_BART |= {"d_model": HIDDEN, "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "dropout": 0.0}

# name: (makes the model, whether position t predicts the label of t + 1)
STACKLESS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "convolution": (lambda: Mixed(Convolution()), True),
    "recurrence": (lambda: Mixed(Recurrence()), True),
    "gru": (lambda: Mixed(Gru()), True),
    "denoising convolution": (lambda: Mixed(Convolution(causal=False), causal=False), False),
    "fourier": (lambda: Mixed(Fourier(), causal=False), False),
    "mamba": (_of_transformers("AutoModelForCausalLM", "mamba", **_STATES), True),
    "mamba2": (
        _of_transformers(
            "AutoModelForCausalLM",
            "mamba2",
            **_STATES,
            num_heads=4,
            head_dim=2 * HIDDEN // 4,
            n_groups=1,
            chunk_size=4,
        ),
        True,
    ),
    "rwkv": (
        _of_transformers(
            "AutoModelForCausalLM",
            "rwkv",
            hidden_size=HIDDEN,
            attention_hidden_size=HIDDEN,
            num_hidden_layers=2,
            use_cache=False,
        ),
        True,
    ),
    "deberta-v2": (_of_transformers("AutoModelForMaskedLM", "deberta-v2", **_ENCODER), False),
    "t5": (
        _of_transformers(
            "AutoModelForSeq2SeqLM",
            "t5",
            d_model=HIDDEN,
            d_kv=8,
            d_ff=64,
            num_layers=1,
            num_heads=HEADS,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            use_cache=False,
        ),
        False,
    ),
    "bart": (
        _of_transformers(
            "AutoModelForSeq2SeqLM",
            "bart",
            **_BART,
            max_position_embeddings=64,
            use_cache=False,
            decoder_start_token_id=2,
        ),
        False,
    ),
}
# whose logits are the head's plus a buffer: per-token values, of which the loss is exact
OF_VALUES = {"bart"}


def make(name: str) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """A model, a batch, and the target of every position."""
    build, causal = STACKLESS[name]
    model, batch = build().train(), make_batch(seq=SEQ)
    return model, batch, shift(batch["labels"]) if causal else batch["labels"]


def logits_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Of the model as it is, never through its compiled forward. (Encoder-decoders make their inputs of the labels.)"""
    return eager_call(model, **batch).logits  # type: ignore[no-any-return]
