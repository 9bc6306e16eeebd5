"""The profile of a step: what it lists, and how it sorts kernels by kind."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import arms
import kernel_times
from shapes import SHAPES, build_model, make_batch


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "matrix product"),
        ("triton_tem_fused_mm_3", "matrix product"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128", "attention"),
        ("_dkv_kernel_0", "attention"),
        ("triton_red_fused__log_softmax__to_copy_add_nll_loss_forward_5", "reduction"),
        ("triton_poi_fused__unsafe_view_mul_silu_4", "pointwise"),
        ("Memcpy DtoD (Device -> Device)", "copy, fill"),
        ("void (anonymous namespace)::something_new", "other"),
    ],
)
def test_kind_of_a_kernel(name: str, kind: str) -> None:
    assert kernel_times.kind_of(name) == kind


def test_profile_lists_the_costliest_first_and_adds_up_kinds() -> None:
    rows = [
        kernel_times.Row("aten::mm", 2, 1.0),
        kernel_times.Row("sgemm", 1, 3.0),
        kernel_times.Row("triton_poi_x", 4, 4.0),
    ]
    text = kernel_times.render("backward", rows, 12.0, limit=1)
    assert text.startswith("backward: 7 calls, 8.00 ms in them, 12.00 ms")
    assert "4.000  50.0%      3     1333.3  matrix product" in text
    assert "sgemm" not in text and "triton_poi_x" in text


def test_profile_of_a_step() -> None:
    shape = SHAPES["tiny"]
    model, batch = build_model(shape, device="cpu", dtype=torch.float32), make_batch(shape, device="cpu")
    text = kernel_times.profile_step(arms.loss_of(model), batch, model, "a header")
    head, forward, backward = text[: text.index("forward:")], *text.split("backward:")
    assert head.startswith("a header") and "aten::mm" in forward and "aten::mm" in backward
    assert "aten::embedding " not in backward
