"""Errors that name what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import backend, compiled, make_batch
from training import small


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_token_ratio": 0.5}, "min_token_ratio.*min_tokens_ratio"),
        ({"kv_grad": "stop"}, "kv_grad.*kv_gradient"),
        ({"min_tokens_ratio": 0.0}, "min_tokens_ratio"),
        ({"min_tokens_ratio": 1.5}, "min_tokens_ratio"),
        ({"min_tokens_ratio": float("nan")}, "min_tokens_ratio"),
        ({"min_tokens_ratio": "0.5"}, "min_tokens_ratio"),
        ({"min_tokens_ratio": True}, "min_tokens_ratio"),
        ({"scoring": "entropi"}, "scoring.*entropy"),
        ({"selection": "best"}, "selection"),
        ({"selection": "topk", "scoring": "random"}, "scoring"),
        ({"router_layers": 0}, "router_layers"),
        ({"router_layers": "all"}, "router_layers"),
        ({"gradient": None}, "gradient"),
        ({"kv_gradient": "detach"}, "kv_gradient"),
        ({"logits": True}, "logits"),
        ({"padding": "leftish"}, "padding"),
        ({"seed": -1}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"advance": "never"}, "advance"),
        ({"fallback": "raise"}, "fallback"),
        ({"compiler": "gcc"}, "compiler"),
        ({"dump_dir": 3}, "dump_dir"),
    ],
    ids=str,
)
def test_wrong_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        torch.compile(lambda x: x + 1, backend=backend(), options={"compiler": "eager", **options})(torch.ones(2))


def test_more_router_layers_than_the_model_has() -> None:
    model, batch = small(), make_batch()
    with pytest.raises(ValueError, match="router_layers"):
        compiled(model, router_layers=3)(**batch)
