"""Which models are given the name of their default loss, and when. End to end: ``test_no_loss_type`` of the causes."""

from __future__ import annotations

from traceback import FrameSummary

import models
import pytest
from torch import nn

from cggr_compile.compat import GraphBreak
from cggr_compile.default_loss import DEFAULT, name_default_loss

WARNS = FrameSummary("/packages/transformers/modeling_utils.py", 4778, "loss_function")
# where Dynamo cannot go on behind the call it tells of no frame inside
ASKS = FrameSummary(
    "/packages/transformers/models/openai/modeling_openai.py", 463, "forward", line="loss = self.loss_function(logits)"
)


class Own(nn.Module):
    """Another library's attribute of the same name."""

    loss_type = None

    @property
    def loss_function(self) -> None:
        return None


def gpt2() -> nn.Module:
    model = models.family("gpt2", n_layer=1)
    model.loss_type = None
    return model


@pytest.mark.parametrize("place", [WARNS, ASKS])
def test_the_default_is_named_once(place: FrameSummary) -> None:
    model, own, named = gpt2(), Own(), models.family("llama", num_hidden_layers=1)
    inside = nn.Sequential(model, own)
    assert name_default_loss(GraphBreak("warns", (place,)), [inside, model, named])
    assert model.loss_type == DEFAULT and own.loss_type is None and named.loss_type == DEFAULT
    assert not name_default_loss(GraphBreak("warns", (place,)), [inside, model, named])


@pytest.mark.parametrize(
    "end",
    [
        None,
        GraphBreak("prints", (FrameSummary("/packages/transformers/modeling_utils.py", 1, "forward"),)),
        GraphBreak("warns", (FrameSummary("/home/user/model.py", 1, "loss_function"),)),
        GraphBreak("warns", (FrameSummary("/home/user/model.py", 1, "forward", line="self.loss_function(logits)"),)),
        GraphBreak("prints", (ASKS, FrameSummary("/home/user/model.py", 1, "print_it"))),
    ],
)
def test_other_breaks_are_left_alone(end: GraphBreak | None) -> None:
    model = gpt2()
    assert not name_default_loss(end, [model]) and model.loss_type is None
