"""What every rewriting pass adds to our own decoder, line by line. Regenerate: EXPECTTEST_ACCEPT=1 pytest <file>."""

from __future__ import annotations

import expecttest
import models
import pytest
import torch.nn.functional as F
from capture import Captured

from cggr_compile.pipeline import semantic_passes


@pytest.fixture(scope="module")
def expect():
    return expecttest.TestCase().assertExpectedInline


@pytest.fixture(autouse=True)
def _four_layers(monkeypatch):
    """The texts number the operators."""
    monkeypatch.setattr(models, "LAYERS", 4)


def added(captured, name: str, width: int = 100) -> str:
    """The lines that one pass adds or changes."""
    passes = [p.name for p in semantic_passes(captured.ctx)]
    captured.run(passes[passes.index(name) - 1])
    before = set(captured.text().splitlines())
    captured.run(name)
    lines = [line.replace("l_fn_decoder_modules_", "") for line in captured.text().splitlines() if line not in before]
    return "\n".join(line[:width].rstrip() for line in lines)


def test_align_targets(decoder_step, expect):
    expect(
        added(decoder_step(), "align_targets"),
        """\
reshape_6 = reshape(reshape_5, 2, 15)  # [2, 15]
pad = pad(reshape_6, (0, 1), constant, -100)  # [2, 16]
ne = ne(pad, -100)  # [2, 16]""",
    )


def test_check_labels(decoder_step, expect):
    expect(
        "\n".join(added(decoder_step(), "check_labels").splitlines()[:2]),
        """\
check_labels_default = check_labels.default(pad, 128, -100)  # [2, 16]
ne = ne(check_labels_default, -100)  # [2, 16]""",
    )


def test_insert_router(decoder_step, expect):
    expect(
        added(decoder_step(), "insert_router"),
        """\
detach = detach(x_2)  # [2, 16, 32]
layer_norm_9 = layer_norm(detach, (32,), ln_f_parameters_weight_, ln_f_parameters_bias_, 1e-05)  # [
detach_1 = detach(wte_parameters_weight_)  # [128, 32]
detach_2 = detach(layer_norm_9)  # [2, 16, 32]
score_default = score.default(detach_2, detach_1, None, check_labels_default, 1.0, 0.0, False)
getitem = getitem(score_default, 0)  # [2, 16]
getitem_14 = getitem(score_default, 1)  # [2, 16]
getitem_15 = getitem(score_default, 2)  # [2, 16]
getitem_16 = getitem(score_default, 3)  # [2, 16]
getitem_17 = getitem(score_default, 4)  # [2, 16]
difficulty_default = difficulty.default(getitem_14, getitem_15, getitem_16, getitem_17, combined)  #""",
    )


def test_select_rows(decoder_step, expect):
    expect(
        added(decoder_step(), "select_rows"),
        """\
inclusion_probabilities_default = inclusion_probabilities.default(difficulty_default, ne, 4, None)
systematic_sample_default = systematic_sample.default(inclusion_probabilities_default, cggr_state)
pack_rows_default = pack_rows.default(systematic_sample_default, 4)
getitem_18 = getitem(pack_rows_default, 0)  # [2, 4]
getitem_19 = getitem(pack_rows_default, 1)  # [2, 4]
row_weights_default = row_weights.default(getitem_18, getitem_19, ne, inclusion_probabilities_defaul
stats_default = stats.default(getitem_19, ne, getitem_15, getitem_14, difficulty_default)  # [5]
where = where(getitem_19, getitem_18, -1)  # [2, 4]""",
    )


def test_select_rows_with_context(decoder_step, expect):
    expect(
        added(decoder_step({"selection": "labels", "scoring": "random", "context": 3}), "select_rows"),
        """\
inclusion_probabilities_default = inclusion_probabilities.default(None, ne, 4, None)  # [2, 16]
systematic_sample_default = systematic_sample.default(inclusion_probabilities_default, cggr_state)
pack_rows_default = pack_rows.default(systematic_sample_default, 4)
getitem = getitem(pack_rows_default, 0)  # [2, 4]
getitem_14 = getitem(pack_rows_default, 1)  # [2, 4]
row_weights_default = row_weights.default(getitem, getitem_14, ne, inclusion_probabilities_default)
context_distance_default = context_distance.default(systematic_sample_default, None, None, 3)  # [2,
gradient_rows_default = gradient_rows.default(getitem, getitem_14, None, context_distance_default, 4
getitem_15 = getitem(gradient_rows_default, 0)  # [2, 4]
getitem_16 = getitem(gradient_rows_default, 1)  # [2, 4]
getitem_17 = getitem(gradient_rows_default, 2)  # [2, 4]
getitem_18 = getitem(gradient_rows_default, 3)  # [3]
stats_default = stats.default(getitem_14, ne, None, None, None, getitem_18)  # [8]
where = where(getitem_14, getitem, -1)  # [2, 4]""",
    )


def test_rewrite_loss(decoder_step, expect):
    expect(
        added(decoder_step(), "rewrite_loss"),
        """\
gather_rows_default_1 = gather_rows.default(reshape_3, getitem_18, getitem_19)  # [2, 4, 32]
linear_16 = linear(gather_rows_default_1, blocks_modules_3_modules_out_parameters_weight_, blocks_mo
gather_rows_default = gather_rows.default(x_6, getitem_18, getitem_19)  # [2, 4, 32]
x_9 = add(gather_rows_default, linear_16)  # [2, 4, 32]
layer_norm_10 = layer_norm(x_9, (32,), blocks_modules_3_modules_ln_2_parameters_weight_, blocks_modu
linear_17 = linear(layer_norm_10, blocks_modules_3_modules_up_parameters_weight_, blocks_modules_3_m
gelu_4 = gelu(linear_17)  # [2, 4, 64]
linear_18 = linear(gelu_4, blocks_modules_3_modules_down_parameters_weight_, blocks_modules_3_module
x_10 = add(x_9, linear_18)  # [2, 4, 32]
layer_norm_11 = layer_norm(x_10, (32,), ln_f_parameters_weight_, ln_f_parameters_bias_, 1e-05)  # [2
logits_1 = linear(layer_norm_11, wte_parameters_weight_, None)  # [2, 4, 128]
gather = gather(check_labels_default, 1, getitem_18)  # [2, 4]
where_1 = where(getitem_19, gather, -100)  # [2, 4]
flatten = reshape(logits_1, 0, 1)  # [8, 128]
flatten_1 = reshape(where_1)  # [8]
cross_entropy_1 = cross_entropy(flatten, flatten_1)  # [8]
flatten_2 = reshape(row_weights_default)  # [8]
mul = mul(cross_entropy_1, flatten_2)  # [8]
sum_1 = sum(mul)  # []
sum_2 = sum(ne)  # []
clamp = clamp(sum_2)  # []
truediv = div(sum_1, clamp)  # []""",
    )


def test_route_gradient_stop(decoder_step, expect):
    expect(
        "\n".join(added(decoder_step({"kv_gradient": "stop"}), "route_gradient").splitlines()[:3]),
        """\
detach_unselected_default = detach_unselected.default(transpose_1, 2)  # [2, 4, 16, 8]
detach_unselected_default_1 = detach_unselected.default(transpose_2, 2)  # [2, 4, 16, 8]
y = scaled_dot_product_attention(transpose, detach_unselected_default, detach_unselected_default_1)""",
    )


def test_route_gradient_project(decoder_step, expect):
    expect(
        "\n".join(added(decoder_step(), "route_gradient").splitlines()[:3]),
        """\
detach_unselected_default = detach_unselected.default(h, 1)  # [2, 16, 32]
linear = linear(detach_unselected_default, blocks_modules_0_modules_qkv_parameters_weight_, blocks_m
detach_unselected_default_1 = detach_unselected.default(h_1, 1)  # [2, 16, 32]""",
    )


def test_detach_outputs(batch, expect):
    decoder = models.Decoder()

    def step(ids, labels):
        logits = decoder(ids)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits, decoder.wte(ids)

    expect(
        added(Captured(step, *batch.values()), "detach_outputs"),
        """new_empty = new_empty(x, [2, 0, 128])  # [2, 0, 128]""",
    )
