"""``cggr::head_gradients``: from what each row's probabilities count back to hidden state, weight and bias.

Every function of a softmax that the operators of this package differentiate has the same form of gradient, with five
numbers a row. The gradient of the logits is made span by span of the vocabulary, in a bounded workspace, and
multiplied out at once: a span's rows of dW are finished by one product, and only dX is summed over the spans, in
float32. That is four products of rows x features x vocabulary where three would do with the logits at hand. Gradients
computed in the forward (Liger, arXiv 2410.10989) need three as well, but sum dW over chunks of rows, and round the
gradient of the logits before a loss scale is known. Cut cross-entropy (arXiv 2411.09009) recomputes as this does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cggr_compile.compat import runs_our_kernels
from cggr_compile.ops.library import LIBRARY, define_opaque, runs_kernels
from cggr_compile.ops.slots import pack_rows_reference

# logits, or their gradients, that exist at a time; of packed rows most are expected to be left out
WORKSPACE = {"cpu": 1 << 22, "cuda": 1 << 25, "packed": 1 << 27}
NO_MASS = 1e30  # a logsumexp beside which every probability is 0
COLUMNS = 1024  # the workspace is so many columns wide, or a multiple


def head_gradients_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logsumexp: Tensor,
    on_p: Tensor,
    on_log_p: Tensor | None,
    on_p2: Tensor | None,
    on_label: Tensor,
    everywhere: Tensor | None,
    scale: float,
    softcap: float,
    pack: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; those that ``output_mask`` does not want are empty.

    With ``z = softcap * tanh(scale * (h W^T + b) / softcap)`` and ``p = exp(z - logsumexp)``, of every row:
    ``dz_j = p_j (on_p + on_log_p log p_j + on_p2 p_j) + on_label 1[j = label] + everywhere``.

    Args:
        hidden: [N, H]. weight: [V, H]. bias: [V] or None. One float dtype.
        labels: integers [N]; one outside [0, V) is no label.
        logsumexp: of z. on_p, on_log_p, on_p2, on_label, everywhere: all [N], float32 (float64 for float64); None is 0.
        scale: factor on the products. softcap: 0 for none.
        pack: rows without a label count nothing, whatever their numbers are, and are left out of the work.
    """
    numbers: list[Any] = [logsumexp, on_p, on_log_p, on_p2, on_label, everywhere]
    known = known_labels(labels, weight.shape[0])[0]
    if pack and hidden.device.type == "cpu":
        index = known.nonzero()[:, 0]
        some: list[Any] = [None if t is None else t[index] for t in (labels, *numbers)]
        rest = (*some, scale, softcap, False, output_mask)
        d_rows, d_weight, d_bias = head_gradients_reference(hidden[index], weight, bias, *rest)
        d_hidden = torch.zeros_like(hidden).index_copy_(0, index, d_rows) if output_mask[0] else d_rows
        return d_hidden, d_weight, d_bias
    if pack:
        numbers = [None if t is None else torch.where(known, t, 0.0) for t in numbers]
        numbers[0] = torch.where(known, logsumexp, NO_MASS)
    columns: list[Any] = [(None if t is None else t[:, None]) for t in numbers]
    lse, *factors = columns

    def logit_gradient(part: slice, into: Tensor) -> None:
        z = logits_of(hidden, weight[part], None if bias is None else bias[part], scale, softcap)
        into.copy_(_logit_gradient(z - lse, labels, part, factors) * (_slope(z, softcap) * scale))

    return multiply_out(logit_gradient, hidden, weight, output_mask, WORKSPACE["cpu"])


def _logit_gradient(log_p: Tensor, labels: Tensor, part: slice, factors: Sequence[Any]) -> Tensor:
    """That of z, for the columns ``part``; ``factors``: on_p to everywhere, [N, 1] or None."""
    on_p, on_log_p, on_p2, on_label, everywhere = factors
    p = torch.exp(log_p)
    factor = on_p if on_log_p is None else on_p + on_log_p * log_p
    dz: Tensor = p * (factor if on_p2 is None else factor + on_p2 * p)
    if everywhere is not None:
        dz = dz + everywhere
    inside = (labels >= part.start) & (labels < part.stop)
    at = torch.where(inside, labels - part.start, 0).long()
    return dz.scatter_add_(1, at[:, None], torch.where(inside[:, None], on_label, 0.0))


def _slope(z: Tensor, softcap: float) -> Tensor | float:
    return 1.0 - (z / softcap) ** 2 if softcap else 1.0


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float) -> Tensor:
    """The logits z, float32 (float64 for float64)."""
    products = torch.nn.functional.linear(hidden, weight, bias).to(wide(hidden.dtype)) * scale
    return torch.tanh(products / softcap) * softcap if softcap else products


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of this dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def known_labels(labels: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Which positions have a label, and labels that are safe to look up."""
    known = (labels >= 0) & (labels < vocab)
    return known, torch.where(known, labels, 0).long()


def labelled_first(labels: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """The order of rows that puts those with a label first, int64 [N], and how many these are, int32 [1]."""
    known = known_labels(labels, vocab)[0]
    return pack_rows_reference(known[None], known.shape[0])[0][0], known.sum(0, keepdim=True, dtype=torch.int32)


class LibraryProducts:
    """The products that a gradient of logits is multiplied out by, over all rows."""

    every_row = True

    def add(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """``total += left @ right`` in the precision of ``total``, where the device can."""
        if left.is_cuda and left.dtype != total.dtype and runs_our_kernels():  # not on ROCm
            torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
        else:
            total += left @ right

    def outer(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """``out = left.t() @ right``."""
        torch.mm(left.t(), right, out=out)


def multiply_out(
    logit_gradient: Callable[[slice, Tensor], None],
    hidden: Tensor,
    weight: Tensor,
    output_mask: Sequence[bool],
    workspace: int,
    products: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three gradients, where ``logit_gradient(part, into)`` writes that of the products' columns ``part``.

    ``workspace``: entries of ``into`` over all rows. ``products``: in place of :class:`LibraryProducts`; without
    ``every_row`` rows that ``logit_gradient`` never writes are not multiplied, and count 0.
    """
    (rows, width), vocab = hidden.shape, weight.shape[0]
    products = products or LibraryProducts()
    columns = min(vocab, max(1, workspace // max(rows, 1) // COLUMNS) * COLUMNS)
    dtype = wide(hidden.dtype)
    with_hidden, with_weight, with_bias = output_mask
    d_hidden = hidden.new_zeros((rows, width) if with_hidden else 0, dtype=dtype)
    d_weight = weight.new_empty((vocab, width) if with_weight else 0)
    d_bias = weight.new_empty(vocab if with_bias else 0)
    # one stride for all spans: it stays a multiple of 16 bytes where the last span's width is not
    space = hidden.new_empty(rows, columns)
    if with_bias and not products.every_row:
        space.zero_()
    for begin in range(0, vocab, columns):
        part = slice(begin, min(begin + columns, vocab))
        gradient = space[:, : part.stop - begin]
        logit_gradient(part, gradient)
        if with_hidden:
            products.add(d_hidden, gradient, weight[part])
        if with_weight:
            products.outer(gradient, hidden, d_weight[part])
        if with_bias:
            d_bias[part] = gradient.sum(0, dtype=dtype)
    return d_hidden.to(hidden.dtype), d_weight, d_bias


def _head_gradients_cuda(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    if not runs_kernels(hidden):
        return head_gradients_reference(hidden, *rest)
    from cggr_compile.kernels.head_gradients import FirstRowsProducts, logit_gradient_triton

    weight, bias, labels, *numbers, scale, softcap, pack, output_mask = rest
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    rows: list[Any] = [hidden, labels, *numbers]  # what there is one of per row
    order = count = products = None
    if pack:
        order, count = labelled_first(labels, weight.shape[0])
        rows = [None if t is None else t[order] for t in rows]
        products = FirstRowsProducts(count)
    workspace = WORKSPACE["packed" if pack else "cuda"]

    def logit_gradient(part: slice, into: Tensor) -> None:
        packed, targets, logsumexp, *factors = rows
        logit_gradient_triton(packed, weight, bias, targets, logsumexp, factors, scale, softcap, count, part, into)

    with torch.cuda.device_of(hidden):
        d_hidden, d_weight, d_bias = multiply_out(logit_gradient, rows[0], weight, output_mask, workspace, products)
        if order is not None and output_mask[0]:
            d_hidden = torch.empty_like(d_hidden).index_copy_(0, order, d_hidden)
    return d_hidden, d_weight, d_bias


def _fake(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    with_hidden, with_weight, with_bias = rest[-1]
    return (
        hidden.new_empty(hidden.shape if with_hidden else 0),
        weight.new_empty(weight.shape if with_weight else 0),
        weight.new_empty(weight.shape[0] if with_bias else 0),
    )


head_gradients = define_opaque(
    "head_gradients(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor logsumexp, Tensor on_p,"
    " Tensor? on_log_p, Tensor? on_p2, Tensor on_label, Tensor? everywhere, float scale, float softcap, bool pack,"
    " bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    head_gradients_reference,
    _fake,
)
# importing Triton waits for the first call on a device
LIBRARY.impl("head_gradients", _head_gradients_cuda, "CUDA")
