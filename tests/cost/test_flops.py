"""Formulas of our operators: the products that their references make."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cggr_compile.cost import flops  # noqa: F401  (registers the formulas)
from cggr_compile.ops.head_gradients import head_gradients_reference
from cggr_compile.ops.moe import moe_reference

ops = torch.ops.cggr


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("wanted", [(True, True, False), (True, False, False), (False, True, False)])
def test_gradients_of_the_head(wanted):
    hidden, weight, labels, numbers = torch.randn(6, 4), torch.randn(10, 4), torch.arange(6), torch.randn(6)
    arguments = (hidden, weight, None, labels, numbers, numbers, None, None, numbers, None, 1.0, 0.0, False, wanted)
    products = counted(lambda: head_gradients_reference(*arguments))
    assert counted(lambda: ops.head_gradients(*arguments)) == products == (1 + sum(wanted)) * 2 * 6 * 10 * 4


def test_the_head_once():
    hidden, weight = torch.randn(6, 4), torch.randn(10, 4)
    assert counted(lambda: ops.score_partials(hidden, weight, None, 1.0, 0.0, 128)) == 2 * 6 * 10 * 4


def test_experts():
    gate_up, down = torch.randn(3, 10, 4), torch.randn(3, 4, 5)
    hidden, weights, experts = torch.randn(6, 4), torch.rand(6, 2), torch.randint(0, 3, (6, 2))
    tensors = [tensor.requires_grad_() for tensor in (hidden, gate_up, down, weights)]
    forward = 2 * 12 * (10 * 4 + 4 * 5)
    assert counted(lambda: moe_reference(*tensors, experts)) == forward
    assert counted(lambda: moe_reference(*tensors, experts).sum().backward()) == 3 * forward


@pytest.mark.parametrize("all_keys", [True, False])
def test_attention_of_rows(all_keys):
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 6, 8)
    rows, lse = torch.arange(3).expand(2, 3), torch.zeros(2, 4, 3)
    arguments = (query, query, key, key, query, lse, rows, None, 1.0, True, all_keys)
    pairs = 2 * (2 * 4 * 3) * 8
    assert counted(lambda: ops.attention_rows_backward(*arguments)) == pairs * (3 * 6 + 4 * (6 if all_keys else 3))
