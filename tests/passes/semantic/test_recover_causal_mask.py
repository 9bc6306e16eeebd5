"""RecoverCausalMask: which masks become is_causal, which stay, and what happens to padding."""

from __future__ import annotations

import shutil

import models
import pytest
import torch
import torch.nn.functional as F
from mask_makers import (
    B,
    Captured,
    S,
    additive,
    alibi,
    assert_causal,
    assert_kept,
    attend,
    attentions,
    bidirectional,
    capture,
    changed_through_alias,
    in_place,
    kinds,
    last_row_differs,
    left_padded,
    lowest,
    off_by_one,
    one_head_differs,
    prefix,
    qkv,
    random,
    right_padded,
    tril,
    window,
    without_diagonal,
    written_through_view,
)
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

from cggr_compile import compat
from cggr_compile.passes.facts import LayerStack, Padding
from cggr_compile.passes.nodes import argument, shape_of
from cggr_compile.passes.semantic.recover_causal_mask import NOT_RIGHT_PADDED


@pytest.mark.parametrize("build", [tril, additive, lowest, in_place, written_through_view, window(S), window(99)])
@pytest.mark.parametrize("dynamic", [False, None])
def test_causal_mask_becomes_is_causal(build, dynamic):
    one = capture(attend(build), qkv(), dynamic=dynamic)
    before = one.gm(*one.inputs)[0]
    result, ctx = one.apply()
    assert result.matched and kinds(result) == {"causal"} and ctx[Padding].mask is None
    assert_causal(one.gm)
    torch.testing.assert_close(one.gm(*one.inputs)[0], before)
    assert ctx[LayerStack].blocks[0].attentions[0].mask is None


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        (bidirectional, "unknown"),
        (off_by_one, "unknown"),
        (without_diagonal, "unknown"),
        (prefix, "unknown"),
        (alibi, "unknown"),
        (one_head_differs, "unknown"),
        (last_row_differs, "unknown"),
        (changed_through_alias, "unknown"),
        (random, "unknown"),
        (window(S - 1), f"sliding_window({S - 1})"),
        (window(1), "sliding_window(1)"),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_other_masks_stay(build, kind, dynamic):
    one = capture(attend(build), qkv(), dynamic=dynamic)
    result, _ = one.apply()
    assert not result.matched and kinds(result) == {kind}
    assert result.reason and all(mask["reason"] and not mask["rewritten"] for mask in result.details["masks"])
    assert_kept(one.gm)


def test_random_generator_is_left_alone():
    one = capture(attend(random), qkv(), dynamic=False)
    state = torch.get_rng_state()
    result, _ = one.apply()
    assert "random" in result.reason
    assert torch.equal(state, torch.get_rng_state())


def test_arguments_by_position_and_other_arguments_are_kept():
    def function(x):
        y = F.scaled_dot_product_attention(x, x, x, tril(S), 0.25, False, scale=0.3)
        return F.scaled_dot_product_attention(y, x[:, :1], x[:, :1], attn_mask=tril(S), scale=0.2, enable_gqa=True)

    one = capture(function, qkv(), dynamic=False)
    assert one.apply()[0].matched
    first, second = attentions(one.gm)
    assert argument(first, 4, "dropout_p") == 0.25 and first.kwargs["scale"] == 0.3
    assert second.kwargs["scale"] == 0.2 and second.kwargs["enable_gqa"] is True
    assert_causal(one.gm)


def test_idempotent():
    one = capture(attend(lambda s, pad: tril(s) & pad[:, None, None].bool()), qkv(), right_padded(16, 9))
    first, _ = one.apply()
    code = one.gm.code
    second, _ = one.apply()
    assert first.matched and not second.matched
    assert second.reason == "nothing to do: no mask tensor"
    assert one.gm.code == code


def test_is_causal_already():
    one = capture(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), qkv())
    result, _ = one.apply()
    assert not result.matched and result.reason == "nothing to do: no mask tensor"


def test_fewer_queries_than_keys():
    one = capture(lambda x: F.scaled_dot_product_attention(x[:, :, 8:], x, x, attn_mask=tril(S)[8:]), qkv())
    result, _ = one.apply()
    assert not result.matched and "as many keys" in result.reason


def test_changed_between_two_attentions():
    def function(x):
        mask = tril(S)
        y = F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        mask[:, 0] = True
        mask[0, 1] = True
        return F.scaled_dot_product_attention(y, x, x, attn_mask=mask)

    one = capture(function, qkv())
    result, _ = one.apply()
    assert not result.matched and "in place" in result.reason
    assert_kept(one.gm)


def test_failing_operator_is_named():
    @torch.library.custom_op("cggr_test::tril", mutates_args=())
    def op(size: int) -> Tensor:
        raise ValueError("not today")

    op.register_fake(lambda size: torch.empty(size, size, dtype=torch.bool))
    captured: list[Captured] = []

    def record(gm, inputs):
        captured.append(Captured(gm, list(inputs)))
        return lambda *args: (args[0],)

    torch.compile(attend(op), backend=record)(qkv())
    result, _ = captured[0].apply()
    assert not result.matched and "ValueError: not today" in result.reason and "tril" in result.reason


LONG = 1 << 17  # a mask of 16 GiB


def looked_at(function, *inputs, **options) -> tuple[str, bool, str]:
    """Kind and fate of the mask of a graph that is not run."""
    found: list[tuple[str, bool, str]] = []

    def record(gm, given):
        (mask,) = Captured(gm, list(given)).apply(**options)[0].details["masks"]
        found.append((mask["kind"], mask["rewritten"], mask["reason"]))
        return lambda *args: (args[0],)

    torch.compile(function, backend=record, dynamic=False)(*inputs)
    return found[0]


@pytest.mark.parametrize("build", [tril, additive, lowest, in_place, written_through_view, window(LONG)])
def test_a_length_too_long_to_compute_is_tried_shorter(build):
    assert looked_at(attend(build), torch.zeros(B, 1, LONG, 1))[:2] == ("causal", True)


@pytest.mark.parametrize(
    ("build", "kind", "reason"),
    [
        (window(64), "sliding_window(64)", "there are"),
        (off_by_one, "unknown", "neither causal"),
        (last_row_differs, "unknown", "could not be computed"),
        (window(LONG // 2), "causal", f"the number {LONG // 2}, too large"),
        (window(LONG - 1), "causal", f"the number {LONG - 1}, too large"),
    ],
)
def test_a_long_mask_that_stays(build, kind, reason):
    found, rewritten, why = looked_at(attend(build), torch.zeros(B, 1, LONG, 1))
    assert found == kind and not rewritten and reason in why


# Masks made from inputs.


def documents(s: int, ids: Tensor) -> Tensor:
    return tril(s) & (ids[:, None, :, None] == ids[:, None, None, :])


@pytest.mark.parametrize(
    "build",
    [
        documents,
        lambda s, ids: tril(s) & (ids.sum(1) > 0)[:, None, None, None],
        lambda s, ids: tril(s) | ids[:, None, None].bool(),
        lambda s, ids: tril(s) & (ids == 0)[:, None, None],
        lambda s, ids: tril(s) & (ids != 5)[:, None, None],
        lambda s, ids: tril(s) & ids.bool()[:, None, :, None],
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
@pytest.mark.parametrize("padding", ["auto", "right"])
def test_data_dependent_mask_stays(build, dtype, padding):
    one = capture(attend(build), qkv(), torch.ones(B, S, dtype=dtype))
    result, ctx = one.apply(padding=padding)
    assert not result.matched and kinds(result) == {"data"} and ctx[Padding].mask is None
    assert_kept(one.gm)


def test_documents_and_padding_stay():
    one = capture(attend(lambda s, ids: documents(s, ids) & (ids != 0)[:, None, None]), qkv(), right_padded(16, 9))
    result, ctx = one.apply(padding="right")
    assert not result.matched and kinds(result) == {"data"} and ctx[Padding].mask is None


def test_two_inputs_stay():
    one = capture(
        attend(lambda s, a, b: tril(s) & a[:, None, None] & b[:, None, None]),
        qkv(),
        torch.ones(B, S).bool(),
        torch.ones(B, S).bool(),
    )
    result, ctx = one.apply()
    assert not result.matched and kinds(result) == {"data"} and ctx[Padding].mask is None


def test_mask_given_as_input_stays():
    one = capture(lambda x, mask: F.scaled_dot_product_attention(x, x, x, attn_mask=mask), qkv(), tril(S))
    result, _ = one.apply()
    assert not result.matched and kinds(result) == {"data"}


# Causal and padding.


def by_bool(s: int, pad: Tensor) -> Tensor:
    return tril(s) & pad.bool()[:, None, None, :]


def by_index(s: int, pad: Tensor) -> Tensor:
    rows, keys = torch.arange(pad.shape[0])[:, None, None, None], torch.arange(s)[None, None, None]
    return (keys <= torch.arange(s)[:, None]) & pad.to(dtype=torch.bool)[rows, keys]


def by_addition(s: int, pad: Tensor) -> Tensor:
    return additive(s) + (1.0 - pad[:, None, None, :].float()) * torch.finfo(torch.float32).min


def by_setitem(s: int, pad: Tensor) -> Tensor:
    mask = torch.full((s, s), torch.finfo(torch.float32).min).triu(1)[None, None].expand(pad.shape[0], 1, s, s).clone()
    mask[:, :, :, :s] = mask[:, :, :, :s].masked_fill(pad[:, None, None, :] == 0, torch.finfo(torch.float32).min)
    return mask


def with_queries(s: int, pad: Tensor) -> Tensor:
    real = pad != 0
    return tril(s) & real[:, None, None, :] & real[:, None, :, None]


def unmasking(s: int, pad: Tensor) -> Tensor:
    mask = by_bool(s, pad)
    return mask | ~mask.any(-1, keepdim=True)


PADDED = [by_bool, by_index, by_addition, by_setitem, unmasking]


@pytest.mark.parametrize("build", PADDED)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("padding", ["auto", "right"])
def test_right_padding_becomes_causal(build, dtype, padding):
    pad = right_padded(16, 9, dtype=dtype)
    one = capture(attend(build), qkv(), pad)
    before = one.gm(*one.inputs)[0]
    result, ctx = one.apply(padding=padding)
    assert result.matched and kinds(result) == {"causal_and_padding"}, result
    assert (
        ctx[Padding].mask is not None
        and shape_of(ctx[Padding].mask) == (B, S)
        and ctx[Padding].mask.op == "placeholder"
    )
    assert_causal(one.gm)
    after = one.gm(*one.inputs)[0]
    real = (pad != 0)[:, None, :, None].expand_as(after)
    torch.testing.assert_close(after[real], before[real])


def test_a_padded_mask_that_is_built_under_vmap_stays():
    def build(s: int, pad: Tensor) -> Tensor:
        return torch.vmap(lambda real: (tril(s) & real.bool())[None])(pad)

    result, _ = capture(attend(build), qkv(), right_padded(16, 9)).apply()
    assert not result.matched and "_remove_batch_dim" in result.reason


@pytest.mark.parametrize("build", PADDED)
def test_a_long_padded_mask(build):
    pad = right_padded(LONG, LONG // 3, size=LONG)
    assert looked_at(attend(build), torch.zeros(B, 1, LONG, 1), pad)[:2] == ("causal_and_padding", True)


@pytest.mark.parametrize("early", [False, True])
def test_padding_that_the_graph_writes_to_is_none(early):
    def program(x: Tensor, pad: Tensor) -> Tensor:
        if early:
            pad.view(-1)[:2] = 1
        y = attend(by_bool)(x, pad)
        if not early:
            pad.zero_()
        return y

    result, ctx = capture(program, qkv(), right_padded(16, 9)).apply(padding="right")
    assert not result.matched and "which the graph writes to" in result.reason and ctx[Padding].mask is None


def test_queries_of_padding_may_be_masked_too():
    one = capture(attend(with_queries), qkv(), right_padded(16, 9))
    result, ctx = one.apply()
    assert result.matched and ctx[Padding].mask is not None


@pytest.mark.parametrize(
    ("pad", "options", "reason"),
    [
        (left_padded(16, 9), {}, "not right-padded"),
        (right_padded(16, 9), {"padding": "any"}, "padding='any'"),
        (right_padded(16, 9), {"min_tokens_ratio": 1.0}, "min_tokens_ratio=1.0"),
        (right_padded(16, 9), {"min_tokens_ratio": 1.0, "padding": "right"}, "min_tokens_ratio=1.0"),
    ],
)
@pytest.mark.parametrize("build", PADDED)
def test_padding_is_found_but_mask_stays(build, pad, options, reason):
    one = capture(attend(build), qkv(), pad)
    before = one.gm(*one.inputs)[0]
    result, ctx = one.apply(**options)
    assert not result.matched and reason in result.reason
    assert ctx[Padding].mask is not None and result.details["padding"] == ctx[Padding].mask.name
    assert_kept(one.gm)
    assert torch.equal(one.gm(*one.inputs)[0], before)


def test_left_padding_with_a_promise_is_caught_at_run_time():
    one = capture(attend(by_bool), qkv(), left_padded(16, 9))
    assert one.apply(padding="right")[0].matched
    with pytest.raises(RuntimeError, match="not right-padded"):
        one.gm(*one.inputs)


def test_values_other_than_one_are_real_tokens():
    pad = right_padded(16, 9) * 7
    one = capture(attend(by_bool), qkv(), pad)
    assert one.apply()[0].matched
    one.gm(*one.inputs)


def test_additive_padding_is_checked_for_zeros_and_ones():
    one = capture(attend(by_addition), qkv(), right_padded(16, 9))
    assert one.apply()[0].matched
    one.gm(*one.inputs)
    with pytest.raises(RuntimeError, match="not right-padded"):
        one.gm(*[x * 2 if x.dtype == torch.int64 else x for x in one.inputs])
    two = capture(attend(by_addition), qkv(), right_padded(16, 9) * 2)
    result, ctx = two.apply()
    assert not result.matched and "zeros and ones" in result.reason and ctx[Padding].mask is not None


def test_sliding_window_and_padding():
    build = lambda s, pad: window(4)(s) & pad.bool()[:, None, None]  # noqa: E731
    one = capture(attend(build), qkv(), right_padded(16, 9))
    result, _ = one.apply()
    assert not result.matched and kinds(result) == {"sliding_window(4)_and_padding"}
    assert_kept(one.gm)


def test_masks_are_decided_one_by_one():
    def function(x, pad):
        y = F.scaled_dot_product_attention(x, x, x, attn_mask=by_bool(S, pad))
        y = F.scaled_dot_product_attention(y, x, x, attn_mask=window(4)(S))
        return F.scaled_dot_product_attention(y, x, x, attn_mask=tril(S))

    one = capture(function, qkv(), right_padded(16, 9))
    result, ctx = one.apply()
    assert result.matched and result.reason == "2 of 3 attentions use is_causal"
    assert [mask["rewritten"] for mask in result.details["masks"]] == [True, False, True]
    assert [block.attentions[0].mask is None for block in ctx[LayerStack].blocks] == [True, False, True]
    assert sum("_assert_async" in str(node.target) for node in one.gm.graph.nodes) == 1


# Symbolic sizes.


def dynamic_sequence(*tensors: Tensor, **bounds: int) -> None:
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, 2 if tensor.dim() == 4 else 1, **bounds)


def guards(one: Captured) -> int:
    return len(one.context().fake_mode.shape_env.guards)


@pytest.mark.parametrize("build", [tril, additive, in_place])
def test_symbolic_length(build):
    x = qkv()
    dynamic_sequence(x)
    one = capture(attend(build), x)
    assert isinstance(shape_of(attentions(one.gm)[0])[2], torch.SymInt)
    before = guards(one)
    result, _ = one.apply()
    assert result.matched and guards(one) == before
    assert_causal(one.gm)


@pytest.mark.parametrize(
    ("width", "bounds", "matched"),
    [(64, {}, False), (4, {}, False), (64, {"min": 2, "max": 64}, True), (64, {"min": 2, "max": 65}, False)],
)
def test_symbolic_length_and_window(width, bounds, matched):
    x = qkv()
    dynamic_sequence(x, **bounds)
    one = capture(attend(window(width)), x)
    before = guards(one)
    result, _ = one.apply()
    assert result.matched == matched and guards(one) == before
    assert kinds(result) == {"causal" if matched else f"sliding_window({width})"}


def test_symbolic_length_and_a_number_too_large_to_try():
    x = qkv()
    dynamic_sequence(x)
    one = capture(attend(window(1 << 18)), x)
    result, _ = one.apply()
    assert not result.matched and str(1 << 18) in result.reason


def test_symbolic_length_cut_inside_the_graph():
    def function(x):
        x = x[:, :, :-1]
        return attend(tril)(x)

    x = qkv()
    dynamic_sequence(x)
    one = capture(function, x)
    assert one.apply()[0].matched
    assert_causal(one.gm)


@pytest.mark.parametrize("build", PADDED)
def test_symbolic_sizes_and_padding(build):
    one = capture(attend(build), qkv(), right_padded(16, 9), dynamic=True)
    before = guards(one)
    result, ctx = one.apply()
    assert result.matched and ctx[Padding].mask is not None and guards(one) == before
    assert_causal(one.gm)


# Hugging Face families.


STATIC = ["llama", "qwen3", "gemma3", "phi3", "gpt2", "gpt_neox"]


@pytest.mark.parametrize(("name", "dynamic"), [*((name, False) for name in STATIC), ("llama", True), ("gemma3", True)])
def test_families(name, dynamic):
    model = models.family(name, **({"sliding_window": 64} if name == "gemma3" else {}))
    ids = torch.randint(0, 64, (B, S))
    one = capture(model, input_ids=ids, labels=ids, dynamic=dynamic)
    result, ctx = one.apply()
    # newer releases of transformers build no mask where they need none
    assert (result.matched and kinds(result) == {"causal"}) or "no mask tensor" in result.reason
    assert ctx[Padding].mask is None
    assert_causal(one.gm)

    torch._dynamo.reset()
    pad = right_padded(16, 9)
    one = capture(model, input_ids=ids, labels=ids, attention_mask=pad, dynamic=dynamic)
    result, ctx = one.apply()
    assert result.matched and kinds(result) == {"causal_and_padding"}
    assert "attention_mask" in ctx[Padding].mask.name
    assert_causal(one.gm)


@pytest.mark.parametrize(("width", "matched"), [(S, 2), (8, 1)])
def test_gemma3_alternates_window_and_full(width, matched):
    layers = ["sliding_attention", "full_attention"]
    model = models.family("gemma3", sliding_window=width, num_hidden_layers=2, layer_types=layers)
    ids = torch.randint(0, 64, (B, S))
    one = capture(model, input_ids=ids, labels=ids, attention_mask=right_padded(16, 9))
    result, _ = one.apply()
    assert sum(mask["rewritten"] for mask in result.details["masks"]) == matched
    assert kinds(result) == (
        {"causal_and_padding"} if matched == 2 else {"causal_and_padding", "sliding_window(8)_and_padding"}
    )


# Through the compiler.


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_assertion_survives_compilation(compiler):
    if compiler == "inductor" and shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")

    def backend(gm, inputs):
        assert Captured(gm, list(inputs)).apply(padding="right")[0].matched
        return aot_eager(gm, inputs) if compiler == "aot_eager" else compat.compile_fx(gm, inputs, {})

    weight = torch.eye(4, requires_grad=True)
    step = torch.compile(lambda x, pad: attend(by_bool)(x @ weight, pad).square().sum(), backend=backend)
    step(qkv(), right_padded(16, 9)).backward()
    assert weight.grad is not None
    with pytest.raises(RuntimeError, match=r"options=.'padding': 'any'") as error:
        step(qkv(), left_padded(16, 9)).backward()
    assert NOT_RIGHT_PADDED in str(error.value)
