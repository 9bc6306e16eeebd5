"""GroupQueries: repeated key and value heads become shared ones, and nothing else does."""

from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F
from capture import execute

from cggr_compile.passes.facts import LayerStack
from cggr_compile.passes.nodes import argument, op_name

REPEATS = models.HEADS // 2


def by_expand(x):
    """As transformers writes it."""
    return x[:, :, None, :, :].expand(x.shape[0], 2, REPEATS, *x.shape[2:]).reshape(x.shape[0], -1, *x.shape[2:])


def by_unsqueeze(x):
    return x.unsqueeze(2).expand(-1, -1, REPEATS, -1, -1).reshape(x.shape[0], models.HEADS, *x.shape[2:])


def by_repeat_interleave(x):
    return torch.repeat_interleave(x, REPEATS, dim=1)


def by_expand_without_gradient(x):
    with torch.no_grad():
        return by_expand(x)


def tiled(x):
    """The same heads in another order."""
    return x.repeat(1, REPEATS, 1, 1)


def tiled_by_expand(x):
    return x[:, None].expand(-1, REPEATS, -1, -1, -1).reshape(x.shape[0], models.HEADS, *x.shape[2:])


def reversed_rows(x):
    return x[:, :, None].flip(3).expand(-1, -1, REPEATS, -1, -1).reshape(x.shape[0], models.HEADS, *x.shape[2:])


def decoder(spell, spell_value=None, **sdpa):
    def attend(q, k, v, mask=None):
        k, v = spell(k[:, :2]), (spell_value or spell)(v[:, :2])
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **sdpa)

    return models.Decoder(attend)


def attentions(captured):
    return [node for node in captured.gm.graph.nodes if op_name(node) == "scaled_dot_product_attention"]


def loss_of(captured):
    (loss,) = execute(captured, captured.gm.graph.output_node().all_input_nodes[0])
    return loss


@pytest.mark.parametrize("spell", [by_expand, by_unsqueeze, by_repeat_interleave])
@pytest.mark.parametrize("ratio", [0.25, 1.0])
def test_shares_heads(decoder_step, spell, ratio):
    model = decoder(spell)
    captured, before = (decoder_step({"min_tokens_ratio": ratio}, model) for _ in range(2))
    result = captured.run("group_queries")
    assert result.matched, result.reason
    captured.check_shapes()
    for node in attentions(captured):
        assert argument(node, 7, "enable_gqa") is True
        assert {argument(node, i, n).meta["example_value"].shape[1] for i, n in ((1, "key"), (2, "value"))} == {2}
    assert [block.attentions[0].key for block in captured.ctx[LayerStack].blocks] == [
        n.args[1] for n in attentions(captured)
    ]
    torch.testing.assert_close(loss_of(captured), loss_of(before))


def mask_of(length):
    return torch.tril(torch.ones(length, length, dtype=torch.bool))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: decoder(tiled), "no repeated heads"),
        (lambda: decoder(tiled_by_expand), "no repeated heads"),
        (lambda: decoder(reversed_rows), "no repeated heads"),
        (lambda: decoder(by_expand, spell_value=tiled), "no repeated heads"),
        (lambda: decoder(by_expand, spell_value=by_expand_without_gradient), "under no_grad"),
        (lambda: decoder(by_expand, dropout_p=0.1), "dropout"),
        (lambda: models.Decoder(), "no repeated heads"),
        (lambda: models.Decoder(documents=True), "mask"),
        (lambda: models.Decoder(models.attend_softmax), "written without"),
    ],
)
def test_leaves_alone(decoder_step, make, reason):
    result = decoder_step({}, make()).run("group_queries")
    assert not result.matched and reason in result.reason


def test_is_idempotent(decoder_step):
    captured = decoder_step({}, decoder(by_expand))
    assert captured.run("group_queries").matched
    del captured.results["group_queries"]
    assert "shared already" in captured.run("group_queries").reason
