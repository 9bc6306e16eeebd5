"""Checks the labels that the loss uses: their range, and that padding has none where the mask has gone."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

import cggr_compile.ops  # noqa: F401  (registers torch.ops.cggr)
from cggr_compile.ops.check_labels import check_labels_reference, expected_labels
from cggr_compile.passes.analysis.example_target import example_target
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import Candidates, LossSite, Padding
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.nodes import fake_value

if TYPE_CHECKING:
    from torch.fx import GraphModule, Node

# Inductor writes this text into C++ and Triton source: no double quotes.
LABELS_ON_PADDING = (
    "cggr: labels mark a position where attention_mask is 0, but this graph was compiled to use causal attention "
    "without it; set the labels of padding to the ignored index, or compile with options={'padding': 'any'}"
)


class CheckLabels(SemanticPass):
    """Looks at the target, as the loss gets it, in every step.

    Before::

        target = pad(labels[:, 1:].reshape(-1).reshape(B, -1), (0, 1), value=-100)   # [B, S]

    After, on a CPU, where the operator raises a ValueError that names the label::

        target = cggr.check_labels(pad(...), V, -100)

    On other devices nobody waits for the values: the graph asserts the same there, and the first batch alone is looked
    at beforehand. Where ``causal_mask`` has replaced a mask, a label of padding would see keys that it must not see:
    that is asserted as well.
    """

    name = "check_labels"
    needs = (LossSite, Candidates)
    uses = (Padding,)
    provides = (Candidates,)

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        loss, candidates = ctx[LossSite], ctx[Candidates]
        padding = ctx.get(Padding)
        unmasked = padding.unmasked if padding else ()
        emit = Emitter(gm.graph, ctx.fake_mode)
        target, vocab, ignored = candidates.target, loss.vocab, loss.ignore_index
        with emit.before(candidates.valid.next, self.name):
            for mask in unmasked:
                _assert_none_on_padding(emit, candidates.valid, mask)
        if not isinstance(vocab, int):
            return PassResult(bool(unmasked), "the size of the vocabulary is symbolic: labels are not checked")
        with emit.before(target.next, self.name):
            if reads_on_the_host(fake_value(target).device):
                checked = emit.call(torch.ops.cggr.check_labels.default, target, vocab, ignored)
                target.replace_all_uses_with(checked, delete_user_cb=lambda user: user is not checked)
                ctx.add(replace(candidates, target=checked))
                return PassResult(True, f"{expected_labels(vocab, ignored)}: a ValueError otherwise")
            if (example := example_target(gm, ctx)) is not None:
                check_labels_reference(example, vocab, ignored)
            _assert_range(emit, target, vocab, ignored)
        return PassResult(True, f"{expected_labels(vocab, ignored)}: asserted on the device")


def reads_on_the_host(device: torch.device) -> bool:
    """On an accelerator looking at the labels would wait for it."""
    return device.type == "cpu"


def _assert_range(emit: Emitter, target: Node, vocab: int, ignored: int) -> None:
    known = emit.call(operator.and_, emit.call(operator.ge, target, 0), emit.call(operator.lt, target, vocab))
    right = emit.method("all", emit.call(operator.or_, known, emit.call(operator.eq, target, ignored)))
    emit.call(torch.ops.aten._assert_async.msg, right, f"cggr: {expected_labels(vocab, ignored)}")


def _assert_none_on_padding(emit: Emitter, valid: Node, padding: Node) -> None:
    right = emit.call(operator.or_, emit.call(torch.logical_not, valid), emit.call(operator.ne, padding, 0))
    emit.call(torch.ops.aten._assert_async.msg, emit.method("all", right), LABELS_ON_PADDING)
