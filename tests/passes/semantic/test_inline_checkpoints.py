"""Activation checkpoints become part of the graph, and are recomputed in the backward pass all the same."""

from __future__ import annotations

import functools
from collections import Counter

import models
import pytest
import torch
import torch.nn.functional as F
from capture import Captured
from reference import Picks, Run, assert_same, backward, dense, reference
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import cggr_compile
from cggr_compile import compat
from cggr_compile.graph_dump import GraphDump
from cggr_compile.joint import joint_pre_pass
from cggr_compile.options import Options
from cggr_compile.passes.semantic.inline_checkpoints import InlineCheckpoints
from cggr_compile.pipeline import copy_module
from cggr_compile.report import GraphReport, PassRecord

HOP = torch.ops.higher_order.tag_activation_checkpoint


class Checkpointed(nn.Module):
    """A module whose activations are recomputed; keyword arguments go to ``checkpoint``."""

    def __init__(self, inner: nn.Module, **arguments) -> None:
        super().__init__()
        self.inner, self.arguments = inner, arguments

    def forward(self, *args):
        return checkpoint(self.inner, *args, use_reentrant=False, **self.arguments)


def decoder(checkpoints: bool, layers: int = 4, **arguments) -> models.Decoder:
    torch.manual_seed(0)
    model = models.Decoder()
    model.blocks = model.blocks[:layers]
    if checkpoints:
        model.blocks = nn.ModuleList(Checkpointed(block, **arguments) for block in model.blocks)
    return model


def decoder_loss(model, batch):
    return F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


def llama(checkpoints: bool, name: str = "llama", **overrides) -> nn.Module:
    model = models.family(name, **overrides)
    model.config.use_cache = False  # transformers' warning about it would break the graph
    if checkpoints:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def llama_loss(model, batch):
    return model(**batch).loss


def saved_bytes(model, call) -> tuple[int, torch.Tensor]:
    """Bytes of the activations that ``call`` keeps for its backward pass, and its loss."""
    parameters = {compat.storage_id(p) for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if compat.storage_id(tensor) not in parameters:
            kept[compat.storage_id(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = call()
    return sum(kept.values()), loss


def train(make, loss, checkpoints: bool, batch, **options) -> tuple[int, Run]:
    """Bytes kept and gradients of one step, with the same weights, selection and random stream each time."""
    torch._dynamo.reset()
    model = make(checkpoints)
    step = models.compiled(lambda: loss(model, batch), **options)
    torch.manual_seed(7)
    size, value = saved_bytes(model, step)
    assert cggr_compile.runtime(model).metrics()["matched"]
    run = backward(model, value)
    return size, Run(run.loss, {name.replace(".inner", ""): grad for name, grad in run.grads.items()})


DECODER = functools.partial(decoder, layers=2), decoder_loss
LLAMA = functools.partial(llama, num_hidden_layers=2), llama_loss
MODES = [
    (*DECODER, {"kv_gradient": "stop"}),
    pytest.param(*DECODER, {"row_sparse": False}, marks=pytest.mark.slow),
    pytest.param(*LLAMA, {"kv_gradient": "stop"}, marks=pytest.mark.slow),
    (*LLAMA, {"kv_gradient": "project"}),
    pytest.param(*LLAMA, {"gradient": "exact"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("make", "loss", "mode"), MODES)
def test_gradients_and_memory(make, loss, mode):
    batch = models.make_batch(2, 64)
    plain_size, plain = train(make, loss, False, batch, **mode)
    size, run = train(make, loss, True, batch, **mode)
    assert_same(run, plain, 1e-6)
    assert plain_size > 1.8 * size, (plain_size, size)


@pytest.mark.slow
def test_inductor():
    make, batch = functools.partial(decoder, layers=2), models.make_batch(2, 64)
    size, run = train(make, decoder_loss, True, batch, scoring="random", compiler="inductor")
    plain_size, plain = train(make, decoder_loss, False, batch, scoring="random")
    assert_same(run, plain)
    assert plain_size > 1.8 * size, (plain_size, size)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [{"kv_gradient": "stop"}, {"row_sparse": False}], ids=str)
def test_dropout_draws_the_same_numbers_again(mode):
    arguments = {"resid_pdrop": 0.3, "attn_pdrop": 0.2, "embd_pdrop": 0.1, "n_layer": 2}
    make = functools.partial(llama, name="gpt2", **arguments)
    _, plain = train(make, llama_loss, False, models.make_batch(), **mode)
    _, run = train(make, llama_loss, True, models.make_batch(), **mode)
    assert_same(run, plain, 1e-6)
    _, still = train(functools.partial(llama, name="gpt2", n_layer=2), llama_loss, True, models.make_batch(), **mode)
    with pytest.raises(AssertionError, match="differ"):
        assert_same(run, still, 1e-2)  # control: there was dropout


def test_ratio_one_leaves_them_alone():
    model, batch = llama(True), models.make_batch()
    models.compiled(model, min_tokens_ratio=1.0)
    run = backward(model, model(**batch).loss)
    (report,) = cggr_compile.runtime(model).reports
    assert "inline_checkpoints" not in [p.name for p in report.passes]
    assert_same(run, dense(llama(True), batch))


# ---------------------------------------------------------------------------------------------------------------
# The pass by itself


def joint_tags(gm, inputs) -> Counter:
    """Operators of the joint graph with the partitioner's tags; checkpoints numbered in order of appearance."""
    tags: Counter = Counter()

    def partition(joint, args, **kwargs):
        numbers: dict = {None: None}
        for node in joint.graph.nodes:
            region = numbers.setdefault(node.meta.get("ac_graph_id"), len(numbers))
            tags[str(node.target), node.meta.get("recompute"), region] += 1
        return compat.default_partition(joint, args, **kwargs)

    compat.aot_eager(gm, inputs, partition)(*inputs)
    return tags


def block(x):
    return x + torch.sin(torch.nn.functional.dropout(x.view(-1, 2), 0.5)).cos().view(x.shape)


def several(x, flag):
    y = x.sin()
    y += 1
    return y, x * 2 if flag else x, None


def views(x, w):
    z = checkpoint(block, x.view(2, 4), use_reentrant=False)
    return F.linear(z, w).view(4, 2)


class Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        square = x * x
        ctx.save_for_backward(square)
        return square * x

    @staticmethod
    def backward(ctx, grad):
        return 3.0 * ctx.saved_tensors[0] * grad


def programs(which: str):
    weight = torch.randn(4, 4, requires_grad=True)

    def two(x):
        return checkpoint(block, checkpoint(block, x @ weight, use_reentrant=False), use_reentrant=False).sum()

    def outputs(x):
        y, z, _ = checkpoint(several, x @ weight, True, use_reentrant=False, preserve_rng_state=False)
        return (y * z).sum()

    def unnested(x):
        y = checkpoint(lambda x: views(x, weight), x @ weight, use_reentrant=False)
        return y.sum()

    def function(x):
        return checkpoint(lambda x: Cubed.apply(x.sin()).cos(), x @ weight, use_reentrant=False).sum()

    found = {"two in a row": two, "several outputs": outputs, "one inside another": unnested}
    return {**found, "an autograd function": function}[which]


def captured(which: str):
    graphs = []

    def keep(gm, inputs):
        inlined = copy_module(gm)
        result = InlineCheckpoints()(inlined, None)
        inlined.recompile()
        inlined.graph.lint()
        graphs.append((gm, inlined, result, inputs, joint_tags(gm, inputs), joint_tags(inlined, inputs)))
        return gm.forward

    function = programs(which)
    torch.compile(function, backend=keep)(torch.randn(2, 4)).backward()
    return graphs[0]


@pytest.mark.parametrize("which", ["two in a row", "several outputs"])
def test_tags_are_those_of_the_operator(which):
    _, inlined, result, _, theirs, ours = captured(which)
    assert result.matched and not inlined.graph.find_nodes(op="call_function", target=HOP)
    assert any(policy == CheckpointPolicy.PREFER_RECOMPUTE for _, policy, _ in theirs)
    assert ours == theirs


def test_an_autograd_function_is_recomputed():
    """The operator of PyTorch 2.11 leaves it out."""
    gm, _, _, inputs, theirs, ours = captured("an autograd function")
    assert ours["aten.mul.Tensor", CheckpointPolicy.PREFER_RECOMPUTE, 1] == 2
    assert {(target, *tag) for target, *tag in theirs if tag[0]} <= {*ours}
    assert joint_tags(gm, inputs) == theirs  # the captured graph has the same body


def test_one_inside_another_is_recomputed_with_it():
    gm, inlined, _, _, theirs, ours = captured("one inside another")
    assert not inlined.graph.find_nodes(op="call_function", target=HOP)
    assert not any(op == "get_attr" for op in (n.op for n in inlined.graph.nodes))
    assert {region for _, policy, region in ours if policy} == {1}
    assert Counter(op for op, policy, _ in ours.elements() if policy) == Counter(
        op for op, policy, _ in theirs.elements() if policy
    )
    assert gm.graph.find_nodes(op="call_function", target=HOP), "the graph that was captured has changed"


def test_twice_is_once():
    _, inlined, _, _, _, _ = captured("two in a row")
    again = InlineCheckpoints()(inlined, None)
    assert not again.matched and again.reason == "no activation checkpoints"


def save_products(ctx, op, *args, **kwargs):
    chosen = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if chosen else CheckpointPolicy.PREFER_RECOMPUTE


def test_selective_checkpoints_are_left_alone():
    context = functools.partial(create_selective_checkpoint_contexts, save_products)
    model, batch = decoder(True, context_fn=context), models.make_batch()
    one = Captured(lambda: decoder_loss(model, batch))
    before = one.operators()
    result = one.run("inline_checkpoints")
    assert not result.matched and "4 left alone: selective" in result.reason and one.operators() == before
    step = models.compiled(lambda: decoder_loss(model, batch), fallback="silent")
    run = backward(model, step())
    runtime = cggr_compile.runtime(model)
    reason = runtime.metrics()["fallback_reason"]
    assert runtime.metrics()["level"] == "loss" and "find_stack" in reason and "selective" in reason
    chosen = Picks(runtime.selected.clone(), runtime.weights.clone())
    logits = lambda: model(batch["input_ids"])  # noqa: E731
    assert_same(run, reference(model, logits, batch["labels"], chosen, gradient="exact"))


def test_some_selective_checkpoints():
    context = functools.partial(create_selective_checkpoint_contexts, save_products)
    model, batch = decoder(True), models.make_batch()
    model.blocks[1] = Checkpointed(model.blocks[1].inner, context_fn=context)
    one = Captured(lambda: decoder_loss(model, batch))
    result = one.run("inline_checkpoints")
    assert result.matched and "3 activation checkpoints; 1 left alone" in result.reason


def test_what_is_recomputed_is_in_the_cache_key():
    """Two graphs that print alike but recompute different nodes must not share compiled code."""

    def key(details):
        report = GraphReport(0, True, "Inductor CPU", {})
        report.passes.append(PassRecord("inline_checkpoints", "dynamo", True, "", details))
        return joint_pre_pass(Options(), report, GraphDump(None, report)).uuid()

    assert key({"regions": [["a", "b"]]}) == key({"regions": [["a", "b"]]})
    assert key({"regions": [["a", "b"]]}) != key({"regions": [["a"]]}) != key({})
