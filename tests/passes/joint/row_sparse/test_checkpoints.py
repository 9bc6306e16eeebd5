"""What an activation checkpoint recomputes for the backward pass: selected rows, but for what attention looks at."""

from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F
from reference import assert_same, backward, hf_reference
from torch import nn
from torch.utils.checkpoint import checkpoint
from training import picks, small

from cggr_compile import compat

PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
LAYERS = 2


@pytest.fixture
def whole_products(monkeypatch):
    """Call after a step: the backward's products with a row for every position of the batch."""
    found = []
    partition = compat.default_partition

    def watched(joint, inputs, **kwargs):
        parts = partition(joint, inputs, **kwargs)
        found.append(parts[1])
        return parts

    monkeypatch.setattr(compat, "default_partition", watched)

    def count(positions):
        nodes = [node for node in found[-1].graph.nodes if node.target in PRODUCTS]
        return sum(node.meta["val"].shape[0] == positions for node in nodes)

    return count


def checkpointed(name, **overrides):
    model = small(name, **{"n_layer" if name == "gpt2" else "num_hidden_layers": LAYERS}, **overrides)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False  # transformers' own warning about it would break the graph
    return model


# query, key and value, or one product for all three; two norms; biases; attention and MLP side by side
@pytest.mark.parametrize(
    ("name", "kept", "kv_gradient"),
    [
        *(("llama", 3, "project"), ("gpt2", 1, "stop"), ("phi", 3, "project"), ("phi", 3, "stop")),
        pytest.param("llama", 3, "stop", marks=pytest.mark.slow),
        pytest.param("gpt2", 1, "project", marks=pytest.mark.slow),
    ],
)
def test_products_outside_of_attention_are_recomputed_on_rows(name, kept, kv_gradient, whole_products):
    batch = models.make_batch(3, 40)
    model = checkpointed(name)
    models.compiled(model, kv_gradient=kv_gradient)
    got = backward(model, model(**batch).loss)
    model.gradient_checkpointing_disable()  # the reference replaces functions that a checkpoint would call again later
    assert_same(got, hf_reference(model, batch, picks(model), kv_gradient=kv_gradient))
    assert whole_products(3 * 40) == LAYERS * kept


def test_control_a_dense_backward_recomputes_every_position(whole_products):
    model = checkpointed("llama")
    models.compiled(model, row_sparse=False)
    model(**models.make_batch(3, 40)).loss.backward()
    assert whole_products(3 * 40) >= LAYERS * 6


@pytest.mark.parametrize(
    "overrides",
    [{"resid_pdrop": 0.5}, {"attn_pdrop": 0.5}, pytest.param({"attn_implementation": "eager"}, marks=pytest.mark.slow)],
)
def test_random_numbers_and_attention_are_recomputed_whole(overrides, whole_products):
    """Dropout draws the numbers of all positions again, softmax takes all keys."""
    runs = []
    for row_sparse in (True, False):
        torch.manual_seed(0)
        model = checkpointed("gpt2", **overrides)
        models.compiled(model, row_sparse=row_sparse, scoring="random")
        torch.manual_seed(1)
        runs.append(backward(model, model(**models.make_batch(3, 40)).loss))
        products = whole_products(3 * 40)
        assert products == LAYERS if row_sparse else products > 2 * LAYERS
    assert_same(*runs)


class Pair(nn.Module):
    """Two blocks in one checkpoint."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x, mask):
        return checkpoint(lambda x: self.second(self.first(x, mask), mask), x, use_reentrant=False)


def test_a_checkpoint_around_two_blocks(whole_products):
    """The first block's MLP feeds the second one's attention: it is needed at every position."""
    batch, runs = models.make_batch(3, 40), []
    for paired in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = models.Decoder(layers=4)
        blocks = list(model.blocks)
        if paired:
            model.blocks = nn.ModuleList([Pair(*blocks[:2]), Pair(*blocks[2:])])

        def loss(model=model):
            return F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())

        runs.append(backward(model, models.compiled(loss, scoring="random", kv_gradient="stop")()))
    plain, run = (list(each.grads.values()) for each in runs)  # in the order of the blocks
    assert all(overall_error(a, b) < 1e-6 for a, b in zip(run, plain, strict=True))
    # the first of each two blocks: four products; the second: one, query, key and value
    assert whole_products(3 * 40) == 2 * (4 + 1)


def overall_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())
