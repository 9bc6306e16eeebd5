"""One attention layer through the joint passes alone: every ATen form and size, against plain autograd.

The forms of CUDA cannot run here: the CPU's backward call is turned into them before the pass, and what the pass
leaves of them is turned back.
"""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.attention.flex_attention as flex
import torch.nn.functional as F
from attention_layer import ON_ROWS, Layer, assert_close, check, masked
from hypothesis import given, settings
from hypothesis import strategies as st

from cggr_compile import compat
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.joint.resolve_markers import ResolveMarkers
from cggr_compile.passes.joint.row_sparse import RowSparseBackward
from cggr_compile.passes.nodes import fake_value

aten = torch.ops.aten
CPU = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
FLASH = aten._scaled_dot_product_flash_attention_backward.default
EFFICIENT = aten._scaled_dot_product_efficient_attention_backward.default
CUDNN = aten._scaled_dot_product_cudnn_attention_backward.default
ROWS = torch.ops.cggr.attention_rows_backward.default


def into(form, dropout=0.0, mask_gradient=False):
    """Turns the CPU's attention backward into another form."""

    def edit(graph):
        (node,) = graph.find_nodes(op="call_function", target=CPU)
        grad, query, key, value, out, logsumexp, _, causal = node.args
        emit = Emitter(graph, fake_value(grad).fake_mode, key="val")
        with emit.before(node, "test"):
            length = fake_value(query).shape[2]
            if form is CUDNN:
                logsumexp = emit.call(aten.unsqueeze.default, logsumexp, 3)
            elif form is EFFICIENT:
                logsumexp = emit.call(aten.constant_pad_nd.default, logsumexp, [0, -length % 32], 7.0)
            seed = emit.call(aten.full.default, [2], 0, dtype=torch.int64, device="cpu")
            given = dict(
                zip(("query", "key", "value", "out", "logsumexp"), (query, key, value, out, logsumexp), strict=True)
            )
            given |= dict(grad_out=grad, grad_out_=grad, attn_bias=node.kwargs.get("attn_mask"), cum_seq_q=None)
            given |= dict(cum_seq_k=None, max_q=length, max_k=length, dropout_p=dropout, is_causal=causal)
            given |= dict(philox_seed=seed, philox_offset=seed, grad_input_mask=[True, True, True, mask_gradient])
            names = [a.name for a in form._schema.arguments if not a.kwarg_only]
            new = graph.call_function(form, tuple(given[name] for name in names), {"scale": node.kwargs.get("scale")})
            new.meta = dict(node.meta)
            if form is EFFICIENT:
                new.meta["val"] = (*node.meta["val"], None)
        node.replace_all_uses_with(new)
        graph.erase_node(node)

    return edit


def back(graph):
    """Turns a dense CUDA form into the CPU's, which runs; asserts that there is one."""
    (node,) = (n for n in graph.nodes if n.target in (FLASH, EFFICIENT, CUDNN))
    names = [a.name for a in node.target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    with graph.inserting_before(node):
        tensors = (given[name] for name in ("query", "key", "value", "out", "logsumexp"))
        new = graph.call_function(
            CPU,
            (node.args[0], *tensors, 0.0, given["is_causal"]),
            {"attn_mask": given.get("attn_bias"), "scale": given["scale"]},
        )
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def scaled(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7)


def written(mask):
    """Attention by hand, with key heads that are shared in a fifth axis."""

    def attend(q, k, v):
        shared = q.shape[1] // k.shape[1]
        if shared == 1:
            return (q @ k.mT / 3).masked_fill(~mask, -1e30).softmax(-1) @ v
        scores = q.unflatten(1, (-1, shared)) @ k[:, :, None].mT / 3
        scores = scores.flatten(1, 2).masked_fill(~mask, -1e30)
        return (scores.softmax(-1).unflatten(1, (-1, shared)) @ v[:, :, None]).flatten(1, 2)

    return attend


@pytest.mark.parametrize("kv_gradient", ["stop", "project"])
@pytest.mark.parametrize("form", [FLASH, EFFICIENT, CUDNN])
def test_forms_of_cuda(form, kv_gradient):
    assert check(Layer(causal, kv_heads=2), kv_gradient, before=into(form)) == ON_ROWS
    assert check(Layer(scaled), kv_gradient, before=into(form)) == ON_ROWS
    if form is not FLASH:
        for mask in (torch.rand(1, 1, 9, 9) > 0.4, torch.randn(2, 4, 9, 9), torch.rand(2, 1, 1, 9) > 0.4):
            layer = Layer(masked(mask.expand(2, 4, 9, 9)))  # as they are given to the memory-efficient form
            assert check(layer, kv_gradient, before=into(form)) == ON_ROWS


@pytest.mark.parametrize("form", [FLASH, EFFICIENT, CUDNN])
def test_dropout_stays_dense_by_name(form):
    """With the gradient of the queries on rows all the same: only attention itself is dense."""
    details = check(Layer(causal), before=into(form, dropout=0.1), after=back)
    assert details["densified"] == {"output": 1} and details["dense_attention"] == {"attention dropout 0.1": 1}


def test_mask_with_a_gradient_stays_dense_by_name():
    """The memory-efficient form gives the mask's gradient as a fourth result: here one more output of the graph."""

    def before(graph):
        into(EFFICIENT, mask_gradient=True)(graph)
        (node,) = graph.find_nodes(op="call_function", target=EFFICIENT)
        output = graph.output_node()
        with graph.inserting_before(output):
            item = graph.call_function(operator.getitem, (node, 3))
        item.meta["val"] = None
        output.args = ((*output.args[0], item),)

    def after(graph):
        output = graph.output_node()
        output.args = (output.args[0][:-1],)
        graph.eliminate_dead_code()
        back(graph)

    details = check(Layer(masked(torch.randn(2, 4, 9, 9))), before=before, after=after)
    assert details["dense_attention"] == {"an attention mask with a gradient": 1}


def test_unknown_layout_stays_dense_by_name():
    def attend(q, k, v):
        return causal(*(t.transpose(0, 1) for t in (q, k, v))).transpose(0, 1)

    details = check(Layer(attend), "project")
    assert details["dense_attention"] == {"an output gradient laid out as (None, 'B', 'S', None)": 1}


@pytest.mark.parametrize("kv_gradient", ["stop", "project"])
def test_more_keys_than_queries(kv_gradient):
    """Two learned keys in front (prefix tuning)."""
    mask = torch.ones(9, 11, dtype=torch.bool).tril(2)
    prefix = torch.randn(2, 4, 2, 8)

    def attend(q, k, v):
        return masked(mask)(q, torch.cat([prefix, k], 2), torch.cat([prefix, v], 2))

    assert check(Layer(attend), kv_gradient) == ON_ROWS


@pytest.fixture
def flexible(monkeypatch):
    """FlexAttention has no backward on the CPU, says its front door; behind that there is one."""
    monkeypatch.setattr(flex, "_validate_device", lambda query, key, value: None)


def flexibly(mask_mod=None, block=4, score=None, keys=9, **sizes):
    blocks = mask_mod and flex.create_block_mask(
        mask_mod, sizes.get("B"), sizes.get("H"), 9, keys, device="cpu", BLOCK_SIZE=block
    )
    return lambda q, k, v: flex.flex_attention(q, k, v, score_mod=score, block_mask=blocks, enable_gqa=True)


DOCUMENTS = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 1, 1, 1, 1]])
QUERY, KEY = torch.arange(9)[:, None], torch.arange(9)
FLEX = {
    "all": (None, {}, torch.ones(9, 9).bool()),
    "causal": (lambda b, h, q, k: q >= k, {}, QUERY >= KEY),
    "window": (lambda b, h, q, k: (q >= k) & (q - k < 3), {}, (QUERY >= KEY) & (QUERY - KEY < 3)),
    "documents": (
        lambda b, h, q, k: (DOCUMENTS[b, q] == DOCUMENTS[b, k]) & (k <= q),
        {"B": 2},
        (DOCUMENTS[:, None, :, None] == DOCUMENTS[:, None, None]) & (QUERY >= KEY),
    ),
    "heads": (
        lambda b, h, q, k: (k <= q) & (q - k <= 2 * h),
        {"H": 4},
        (QUERY >= KEY) & (2 * torch.arange(4)[None, :, None, None] >= QUERY - KEY),
    ),
}


@pytest.mark.parametrize(("name", "kv_gradient"), [*((name, "stop") for name in FLEX), ("documents", "project")])
def test_flex_attention(flexible, name, kv_gradient):
    """Its blocks of four keys are listed as empty, full, and in between."""
    mask_mod, sizes, mask = FLEX[name]
    layer = Layer(flexibly(mask_mod, **sizes), kv_heads=2)
    got, result = layer.optimised(kv_gradient)
    layer.attend = masked(mask, gqa=True)
    assert_close(got, layer.expected(kv_gradient))
    assert {name: result.details[name] for name in ON_ROWS} == ON_ROWS


def test_flex_attention_of_queries_without_keys(flexible):
    nothing = lambda b, h, q, k: (q >= k) & (q > 3)  # noqa: E731
    layer = Layer(flexibly(nothing, block=128), batch=1, slots=7, unused=0)
    got, result = layer.optimised("stop")
    layer.attend = lambda q, k, v: masked((QUERY >= KEY) & (QUERY > 3))(q, k, v)
    assert_close(got, layer.expected("stop"))
    assert not result.details["dense_attention"]


def test_flex_attention_computes_the_blocks_that_are_listed(flexible):
    """As the kernels do, whatever mask_mod would say: without any block attention has no gradient."""
    blocks = flex.create_block_mask(FLEX["causal"][0], None, None, 9, 9, device="cpu", BLOCK_SIZE=4)
    for count in (blocks.kv_num_blocks, blocks.full_kv_num_blocks):
        count.zero_()
    layer = Layer(lambda q, k, v: flex.flex_attention(q, k, v, block_mask=blocks))
    (_, *weights), _ = layer.optimised("stop")
    assert not any(weight.any() for weight in weights)


def scored(score, batch, head, query, key):
    return torch.where(query >= key, score + BIAS[key], -float("inf"))


def with_logsumexp(query, key, value):
    out, aux = flex.flex_attention(query, key, value, enable_gqa=True, return_aux=flex.AuxRequest(lse=True))
    return out * torch.sigmoid(aux.lse)[..., None]


def with_sink(query, key, value):
    """The same by hand."""
    scores = query @ key.repeat_interleave(2, 1).mT * query.shape[-1] ** -0.5
    out = scores.softmax(-1) @ value.repeat_interleave(2, 1)
    return out * torch.sigmoid(scores.logsumexp(-1))[..., None]


BIAS = torch.linspace(-1, 1, 9)
KEPT = torch.ones(9, 9, 9).bool()
DENSE_FLEX = {
    "a score_mod": (flexibly(score=scored), masked(torch.where(QUERY >= KEY, BIAS, -torch.inf), gqa=True)),
    "a gradient of its log-sum-exp": (with_logsumexp, with_sink),
    "a mask_mod that is not elementwise": (
        lambda q, k, v: flexibly(lambda b, h, q, k: KEPT[q][k].all() & (q >= k))(q, k, v),
        masked(QUERY >= KEY, gqa=True),
    ),
}


@pytest.mark.parametrize("why", DENSE_FLEX)
def test_flex_attention_stays_dense_by_name(flexible, why, kv_gradient="stop"):
    flexed, by_hand = DENSE_FLEX[why]
    layer = Layer(flexed, kv_heads=2)
    got, result = layer.optimised(kv_gradient)
    layer.attend = by_hand
    assert_close(got, layer.expected(kv_gradient))
    assert result.details["dense_attention"] == {f"FlexAttention with {why}": 1}
    assert result.reason.endswith(f"dense attention: 1 × FlexAttention with {why}")  # which explain() prints


def test_flex_attention_stays_dense_on_devices_without_evidence(flexible, monkeypatch):
    monkeypatch.setattr("cggr_compile.passes.patterns.attention.flex.DEVICES", ())
    layer = Layer(flexibly(FLEX["causal"][0]))
    got, result = layer.optimised("project")
    layer.attend = causal
    assert_close(got, layer.expected("project"))
    assert result.details["dense_attention"] == {"FlexAttention on cpu": 1}


def test_casts_are_looked_through():
    """Only the gradients of selected keys are computed where that is all a marker wants."""

    def whole(graph):
        (node,) = graph.find_nodes(op="call_function", target=ROWS)
        found.append(node.args[-2])

    found: list[bool] = []
    for cast in (False, True):
        assert check(Layer(causal, kv_heads=2, cast=cast), after=whole) == ON_ROWS
    assert check(Layer(causal, kv_heads=2), "project", after=whole) == ON_ROWS
    assert found == [False, False, True]


def test_products_of_attention_by_hand():
    """Two of the forward, and in the backward what is asked for: all keys' gradients only for their projections."""
    found: list[int] = []

    def count(graph):
        shapes = [tuple(node.meta["val"].shape[1:]) for node in graph.nodes if node.target is aten.bmm.default]
        assert len(shapes) == 6
        found.append(sum(9 in shape for shape in shapes))

    layer = Layer(written(torch.ones(9, 9, dtype=torch.bool).tril()))
    for kv_gradient in ("stop", "project"):
        assert check(layer, kv_gradient, after=count) == ON_ROWS
    assert found == [3, 5]


@pytest.mark.parametrize("kv_gradient", ["stop", "project"])
def test_queries_that_see_nothing(kv_gradient):
    """Their output is zero and so is what they pass on, selected or not."""
    mask = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    mask[:, :, ::2] = False
    for attend in (masked(mask), masked(torch.where(mask, 0.0, -torch.inf))):
        layer = Layer(attend, slots=6)
        assert not mask[0, 0, layer.rows[0]].any(-1).all()
        assert check(layer, kv_gradient) == ON_ROWS


def test_padded_heads():
    """Flash attention on CUDA wants the size of heads to be a multiple of 8."""

    def attend(query, key, value):
        query, key, value = (F.pad(t, (0, 3)) for t in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.4)[..., :5]

    for kv_gradient in ("stop", "project"):
        assert check(Layer(attend, width=5), kv_gradient) == ON_ROWS


def masks(draw, batch, heads, length):
    """None (causal), or a mask with True on the diagonal, in any of the shapes and kinds that are allowed."""
    lead = draw(st.sampled_from([(), (1, 1), (batch, 1), (1, heads), (batch, heads)]))
    queries = draw(st.sampled_from([1, length]))
    if not lead and queries == 1:
        return None
    seen = torch.rand(*lead, queries, length) > 0.5
    seen |= torch.eye(length, dtype=torch.bool) if queries == length else torch.arange(length) == 0
    return seen if draw(st.booleans()) else torch.where(seen, torch.randn(seen.shape), -torch.inf)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from(["stop", "project"]), st.booleans(), st.booleans())
def test_sizes(data, kv_gradient, by_hand, cast):
    check_sizes(data, kv_gradient, by_hand, cast)


@settings(max_examples=8, deadline=None)
@given(st.data(), st.sampled_from(["stop", "project"]), st.booleans(), st.booleans())
def test_some_sizes(data, kv_gradient, by_hand, cast):
    check_sizes(data, kv_gradient, by_hand, cast)


def check_sizes(data, kv_gradient, by_hand, cast):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 1000)))
    batch, heads, length = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 4])), draw(st.integers(2, 6))
    kv_heads = draw(st.sampled_from([n for n in (1, 2, 4) if n <= heads]))
    slots = draw(st.sampled_from([1, length, draw(st.integers(1, length))]))
    width, unused = draw(st.sampled_from([2, 4, 8])), draw(st.integers(0, slots))
    mask = masks(draw, batch, heads, length)
    if by_hand:
        seen = torch.ones(length, length, dtype=torch.bool).tril() if mask is None else mask
        attend = written(seen if seen.dtype == torch.bool else seen.isfinite())
    else:
        attend = causal if mask is None else masked(mask, gqa=heads != kv_heads)
    layer = Layer(attend, batch, heads, kv_heads, length, width, slots, unused, cast)
    assert check(layer, kv_gradient) == ON_ROWS


@pytest.mark.slow
def test_inductor_draws_the_same_numbers():
    """Dropout of attention and of its output, where Inductor turns the random operators into its own."""

    def attend(q, k, v):
        return F.dropout(F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.2), 0.3)

    layer = Layer(attend)

    def gradients(*passes):
        class Passes(compat.custom_graph_pass()):
            def __call__(self, graph):
                assert all(joint_pass(graph).matched for joint_pass in passes)

            def uuid(self):
                return None

        torch.manual_seed(3)
        settings = {"joint_custom_pre_pass": Passes()}
        return layer.compiled(lambda gm, inputs: compat.compile_fx(gm, inputs, settings))

    on_rows, dense = gradients(RowSparseBackward(), ResolveMarkers()), gradients(ResolveMarkers())
    assert_close(on_rows, dense)
    with pytest.raises(AssertionError):  # other numbers, other gradients
        assert_close(on_rows, layer.expected("stop"))
