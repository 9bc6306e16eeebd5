from __future__ import annotations

import models
import pytest
import torch
import torch.nn.functional as F
from capture import Captured

from cggr_compile.causes import Cause
from cggr_compile.passes.facts import FinalStates, LayerStack, NoLayerStack
from cggr_compile.passes.nodes import op_name, shape_of
from cggr_compile.pipeline import semantic_passes


def test_own_decoder(decoder_step):
    captured = decoder_step()
    result = captured.run("find_stack")
    assert result.matched and result.reason == "4 blocks, alike"
    stack = captured.ctx[LayerStack]
    assert [b.name for b in stack.blocks] == [f"decoder.blocks.{i}" for i in range(4)]
    for previous, block in zip(stack.blocks, stack.blocks[1:], strict=False):
        assert previous.output is block.input
    assert stack.source is stack.blocks[0].input
    assert all(shape_of(b.output) == (2, 16, models.HIDDEN) for b in stack.blocks)
    assert [b.attentions[0].kind for b in stack.blocks] == ["sdpa"] * 4
    final = captured.ctx[FinalStates]
    assert final.states is stack.blocks[-1].output and final.tail and final.tail_start == 0


def test_module_names_are_only_labels(decoder_step):
    named, nameless = decoder_step(), decoder_step()
    for node in nameless.gm.graph.nodes:
        node.meta.pop("nn_module_stack", None)
    named.run("find_stack")
    assert nameless.run("find_stack").matched
    strip = lambda c: [(str(b.input), str(b.output), b.signature) for b in c.ctx[LayerStack].blocks]  # noqa: E731
    assert strip(named) == strip(nameless)
    assert [b.name for b in nameless.ctx[LayerStack].blocks] == [f"block_{i}" for i in range(4)]


@pytest.mark.parametrize("attend", [models.attend_softmax, models.attend_bidirectional])
def test_other_attentions(attend, decoder_step):
    captured = decoder_step(decoder=models.Decoder(attend))
    assert captured.run("find_stack").matched


def test_keys_are_found_before_the_transpose(decoder_step):
    captured = decoder_step(decoder=models.Decoder(models.attend_softmax))
    captured.run("find_stack")
    attention = captured.ctx[LayerStack].blocks[0].attentions[0]
    assert shape_of(attention.key)[attention.key_dim] == 16 == shape_of(attention.value)[attention.value_dim]
    assert (attention.key_dim, attention.value_dim) == (3, 2)


def test_sizes_that_coincide():
    """B = S = heads, S = hidden: axes must not be mixed up."""
    size = models.HIDDEN
    ids = torch.randint(0, models.VOCAB, (size, size))
    captured = Captured(lambda i: F.cross_entropy(models.Decoder()(i).flatten(0, 1), i.flatten()), ids)
    assert captured.run("find_stack").matched
    assert {b.attentions[0].key_dim for b in captured.ctx[LayerStack].blocks} == {2}


def test_symbolic_sizes(batch):
    decoder = models.Decoder()

    def step(ids, labels):
        return F.cross_entropy(decoder(ids).flatten(0, 1), labels.flatten())

    for tensor in batch.values():
        torch._dynamo.mark_dynamic(tensor, 0)
        torch._dynamo.mark_dynamic(tensor, 1)
    captured = Captured(step, *batch.values())
    assert captured.run("find_stack").matched
    assert len(captured.ctx[LayerStack].blocks) == 4


class Rotated(models.Decoder):
    """Angles are looked up in a table: a buffer, trained or frozen; they rotate queries and keys of every block."""

    def __init__(self, trained):
        super().__init__(self.rotated, fused=False)
        angles = torch.randn(64, models.HIDDEN // models.HEADS)
        if trained is not None:
            self.angles = torch.nn.Parameter(angles, requires_grad=trained)
        else:
            self.register_buffer("angles", angles)

    def rotated(self, q, k, v, mask):
        factor = self.angles[torch.arange(q.shape[2])].cos()
        return models.attend_sdpa(q * factor, k * factor, v)


@pytest.mark.parametrize("trained", [None, False, True])
def test_a_table_of_angles_is_no_embedding(trained, batch):
    decoder = Rotated(trained)
    captured = Captured(lambda ids: F.cross_entropy(decoder(ids).flatten(0, 1), ids.flatten()), batch["input_ids"])
    assert captured.run("find_stack").matched != trained
    assert trained or len(captured.ctx[LayerStack].blocks) == models.LAYERS


def test_mixing_behind_the_last_attention_is_a_block(batch):
    decoder = models.Decoder()
    decoder.ln_f.register_forward_hook(lambda module, args, out: out + out.cumsum(1))
    captured = Captured(lambda ids: F.cross_entropy(decoder(ids).flatten(0, 1), ids.flatten()), batch["input_ids"])
    result = captured.run("find_stack")
    assert result.reason == "5 blocks, of 3 kinds, 1 with scan"
    last = captured.ctx[LayerStack].blocks[-1]
    assert not last.attentions and last.mixer.kind == "scan" and last.mixing == last.mixer.nodes
    assert captured.ctx[FinalStates].states is last.output


def test_products_of_padded_chunks_mix(batch):
    decoder = models.Decoder(layers=1)

    def mix(module, args, out):
        x = F.pad(out, (0, 0, 0, 1))[:, None]
        return out + (x @ x.transpose(-1, -2) @ x)[:, 0, :-1]

    decoder.ln_f.register_forward_hook(mix)
    captured = Captured(lambda ids: F.cross_entropy(decoder(ids).flatten(0, 1), ids.flatten()), batch["input_ids"])
    assert captured.run("find_stack").reason == "2 blocks, of 2 kinds, 1 with linear_attention"


class Narrow(models.Decoder):
    """The embedding has fewer features than the stream."""

    def __init__(self):
        super().__init__(tied=False, layers=2)
        self.narrow, self.widen = torch.nn.Embedding(models.VOCAB, 8), torch.nn.Linear(8, models.HIDDEN)

    def forward(self, ids):
        x = self.widen(self.narrow(ids))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class Sorting(models.Decoder):
    """Between attentions tokens are sorted and put back, as experts do: rows of hidden states are no embedding."""

    def __init__(self):
        super().__init__(layers=2)
        self.inner = torch.nn.Linear(models.HIDDEN, models.HIDDEN)

    def forward(self, ids):
        order, x = ids.flatten().argsort(), self.wte(ids)
        for block in self.blocks:
            x = block(x)
            x = x + self.inner(x.flatten(0, 1)[order])[order.argsort()].view_as(x)
        return self.lm_head(self.ln_f(x))


class Noisy(models.Decoder):
    """Noise of the stream's shape is written in place, as in the router of Phi-3.5-MoE."""

    def __init__(self):
        super().__init__(layers=2)

    def forward(self, ids):
        x = self.wte(ids)
        for block in self.blocks:
            x = block(x * (torch.rand_like(x).uniform_() > 0.1))
        return self.lm_head(self.ln_f(x))


@pytest.mark.parametrize("model", [Narrow, Sorting, Noisy])
def test_streams_that_begin_behind_the_embedding(model, batch):
    decoder = model()
    captured = Captured(lambda ids: F.cross_entropy(decoder(ids).flatten(0, 1), ids.flatten()), batch["input_ids"])
    assert captured.run("find_stack").matched, captured.results["find_stack"].reason
    assert len(captured.ctx[LayerStack].blocks) == 2


def mlp(ids):
    table = torch.ones(models.VOCAB, 8, requires_grad=True)
    return F.cross_entropy(F.linear(F.relu(F.embedding(ids, table)), table).flatten(0, 1), ids.flatten())


def no_embedding(ids):
    table = torch.ones(models.VOCAB, 8, requires_grad=True)
    return F.cross_entropy(F.linear(torch.ones(2, 16, 8), table).flatten(0, 1), ids.flatten())


@pytest.mark.parametrize(("function", "why"), [(mlp, "no attention"), (no_embedding, "no token embedding")])
def test_must_not_match(function, why, batch):
    captured = Captured(function, batch["input_ids"])
    result = captured.run("find_stack")
    assert not result.matched and why in result.reason


def test_tail_must_be_position_wise(batch):
    decoder = models.Decoder()
    decoder.ln_f.register_forward_hook(lambda module, args, out: out.sort(1).values)
    captured = Captured(lambda ids: F.cross_entropy(decoder(ids).flatten(0, 1), ids.flatten()), batch["input_ids"])
    result = captured.run("find_stack")
    assert result.cause is None and "sort" in result.reason  # find_states has its turn
    assert captured.ctx[NoLayerStack].refusal.cause is Cause.UNSUPPORTED_STACK


def test_activation_checkpoints_that_were_not_inlined_are_named(batch):
    model = models.family("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    captured = Captured(model, **batch, use_cache=False)
    result = captured.run("find_stack", semantic_passes(captured.ctx)[1:])
    assert not result.matched and captured.ctx[NoLayerStack].refusal.cause is Cause.CLOSED_CHECKPOINTS


class EveryLayer(models.Decoder):
    """Each layer is given an embedding of its own: behind the block, or into its keys and values."""

    def __init__(self, *, into_keys=False):
        super().__init__(layers=3)
        self.beside, self.into_keys = torch.nn.Embedding(models.VOCAB, 3 * models.HIDDEN), into_keys

    def forward(self, ids):
        x = self.wte(ids)
        own = self.beside(ids).chunk(3, dim=-1)
        for i, block in enumerate(self.blocks):
            keys = own[0] if self.into_keys else own[i]
            x = block(x) + F.gelu(x) * keys
            if self.into_keys:
                q, k = models.split_heads(x), models.split_heads(keys)
                x = x + models.attend_sdpa(q, k, k).transpose(1, 2).reshape(x.shape)
        return self.lm_head(self.ln_f(x))


def test_what_goes_past_the_layers_position_by_position(batch):
    decoder = EveryLayer()
    captured = Captured(lambda ids: F.cross_entropy(decoder(ids).flatten(0, 1), ids.flatten()), batch["input_ids"])
    assert captured.run("find_stack").matched, captured.results["find_stack"].reason
    stack = captured.ctx[LayerStack]
    assert op_name(stack.source) == "embedding" and shape_of(stack.source) == (2, 16, models.HIDDEN)
    assert [op_name(block.output) for block in stack.blocks] == ["add"] * 3


def test_keys_that_go_past_the_layers(batch):
    decoder = EveryLayer(into_keys=True)
    captured = Captured(lambda ids: F.cross_entropy(decoder(ids).flatten(0, 1), ids.flatten()), batch["input_ids"])
    assert captured.run("find_stack").matched and len(captured.ctx[LayerStack].blocks) == 6


def test_what_goes_past_the_layers_without_rows_is_no_stack(batch):
    """The stream with its sequences and positions folded has no row for each position of a sequence."""
    decoder = models.Decoder(layers=2)

    def step(ids):
        x = decoder.wte(ids)
        first = decoder.blocks[0](x).flatten(0, 1)
        for block in decoder.blocks:
            x = block(x) + first.view_as(x)
        return F.cross_entropy(decoder.lm_head(decoder.ln_f(x)).flatten(0, 1), ids.flatten())

    result = Captured(step, batch["input_ids"]).run("find_stack")
    assert not result.matched and result.cause is None, result.reason


def test_attention_over_an_image_with_as_many_patches_as_tokens(batch):
    decoder, image = models.Decoder(layers=2), torch.randn(2, 16, models.HIDDEN)
    tower = models.Decoder(layers=1)

    def step(ids, image):
        patches = tower.blocks[0](image + tower.wpe(torch.arange(16)))
        x = decoder.wte(ids).masked_scatter((ids < 3)[..., None], patches)
        for block in decoder.blocks:
            x = block(x)
        return F.cross_entropy(decoder.lm_head(decoder.ln_f(x)).flatten(0, 1), ids.flatten())

    captured = Captured(step, batch["input_ids"], image)
    assert captured.run("find_stack").reason == "2 blocks, alike"
