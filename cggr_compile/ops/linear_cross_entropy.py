"""``cggr::linear_cross_entropy``: the cross-entropy of a head's logits, row by row, without keeping the logits.

The forward keeps one logsumexp per row. With it the backward can make the gradient of the logits span by span of the
vocabulary, in a bounded workspace, and multiply it out at once: a span's rows of dW are finished by one product, and
only dX is summed over the spans, in float32. That is four products of rows x features x vocabulary where three would
do with the logits at hand. Gradients computed in the forward (Liger, arXiv 2410.10989) need three as well, but sum dW
over chunks of rows, and round the gradient of the logits before a loss scale is known. Cut cross-entropy
(arXiv 2411.09009) recomputes as this does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cggr_compile.compat import runs_our_kernels
from cggr_compile.ops.library import LIBRARY, define_opaque, runs_kernels

# logits, or their gradients, that exist at a time
WORKSPACE = {"cpu": 1 << 22, "cuda": 1 << 25}
COLUMNS = 1024  # the workspace is so many columns wide, or a multiple


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Loss and logsumexp of ``z = softcap * tanh(scale * (h W^T + b) / softcap)``, per row; both differentiable.

    ``loss = logsumexp(z) - (1 - label_smoothing) * z[label] - label_smoothing * mean(z)``. Weights, a reduction and
    its normaliser are arithmetic on the loss; a z-loss (PaLM, arXiv 2204.02311, section 5) is on the logsumexp.

    Args:
        hidden: [N, H]. weight: [V, H]. bias: [V] or None. One float dtype.
        labels: integers [N]; at a row whose label is outside [0, V) (such as -100) the loss is 0, without gradient.
        scale: factor on the products. softcap: 0 for none. label_smoothing: in [0, 1] (arXiv 1512.00567).

    Returns:
        float32 [N] each (float64 for float64).

    Raises:
        ValueError: naming the argument whose shape, dtype or value does not fit.
    """
    _check(hidden, weight, bias, labels, softcap, label_smoothing)
    found = [hidden.new_empty(hidden.shape[0], dtype=_wide(hidden.dtype)) for _ in range(2)]
    chunk = max(1, WORKSPACE["cpu"] // weight.shape[0])
    for begin in range(0, hidden.shape[0], chunk):
        part = slice(begin, begin + chunk)
        logits = _logits(hidden[part], weight, bias, scale, softcap)
        known, safe = _known(labels[part], weight.shape[0])
        picked = logits.gather(1, safe[:, None])[:, 0]
        logsumexp = torch.logsumexp(logits, 1)
        aim = picked if not label_smoothing else torch.lerp(picked, logits.mean(1), label_smoothing)
        found[0][part], found[1][part] = torch.where(known, logsumexp - aim, 0.0), logsumexp
    return found[0], found[1]


def linear_cross_entropy_backward_reference(
    grad_loss: Tensor,
    grad_logsumexp: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logsumexp: Tensor,
    scale: float,
    softcap: float,
    label_smoothing: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; those that ``output_mask`` does not want are empty.

    With p = exp(z - logsumexp), t = (1 - label_smoothing) onehot(label) + label_smoothing / V and known rows k:
    dz = p (k grad_loss + grad_logsumexp) - t k grad_loss.

    Args:
        grad_loss: [N]. grad_logsumexp: [N] or None. logsumexp: as the forward returned it; the others as there.
    """
    vocab = weight.shape[0]
    on_p, on_t = _factors(grad_loss, grad_logsumexp, labels, vocab)

    def logit_gradient(part: slice, into: Tensor) -> None:
        z = _logits(hidden, weight[part], None if bias is None else bias[part], scale, softcap)
        dz = torch.exp(z - logsumexp[:, None]) * on_p[:, None] - (on_t * (label_smoothing / vocab))[:, None]
        inside = (labels >= part.start) & (labels < part.stop)
        at = torch.where(inside, labels - part.start, 0)
        dz.scatter_add_(1, at[:, None], torch.where(inside, (label_smoothing - 1.0) * on_t, 0.0)[:, None])
        if softcap:
            dz *= 1.0 - (z / softcap) ** 2
        into.copy_(dz * scale)

    return _multiply_out(logit_gradient, hidden, weight, output_mask, WORKSPACE["cpu"])


def _multiply_out(
    logit_gradient: Callable[[slice, Tensor], None],
    hidden: Tensor,
    weight: Tensor,
    output_mask: Sequence[bool],
    workspace: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three gradients, where ``logit_gradient(part, into)`` writes that of the products' columns ``part``."""
    (rows, width), vocab = hidden.shape, weight.shape[0]
    columns = min(vocab, max(1, workspace // max(rows, 1) // COLUMNS) * COLUMNS)
    wide = _wide(hidden.dtype)
    with_hidden, with_weight, with_bias = output_mask
    d_hidden = hidden.new_zeros((rows, width) if with_hidden else 0, dtype=wide)
    d_weight = weight.new_empty((vocab, width) if with_weight else 0)
    d_bias = weight.new_empty(vocab if with_bias else 0)
    # one stride for all spans: it stays a multiple of 16 bytes where the last span's width is not
    space = hidden.new_empty(rows, columns)
    for begin in range(0, vocab, columns):
        part = slice(begin, min(begin + columns, vocab))
        gradient = space[:, : part.stop - begin]
        logit_gradient(part, gradient)
        if with_hidden:
            _add_product(d_hidden, gradient, weight[part])
        if with_weight:
            torch.mm(gradient.t(), hidden, out=d_weight[part])
        if with_bias:
            d_bias[part] = gradient.sum(0, dtype=wide)
    return d_hidden.to(hidden.dtype), d_weight, d_bias


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` in the precision of ``total``, where the device can."""
    if left.is_cuda and left.dtype != total.dtype and runs_our_kernels():  # not on ROCm
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float) -> Tensor:
    products = torch.nn.functional.linear(hidden, weight, bias).to(_wide(hidden.dtype)) * scale
    return torch.tanh(products / softcap) * softcap if softcap else products


def _known(labels: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Which rows have a label, and labels that are safe to look up."""
    known = (labels >= 0) & (labels < vocab)
    return known, torch.where(known, labels, 0).long()


def _factors(grad_loss: Tensor, grad_logsumexp: Tensor | None, labels: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """What each row's probabilities, and its targets, count in the gradient of its logits."""
    on_t = torch.where(_known(labels, vocab)[0], grad_loss, 0.0)
    return (on_t if grad_logsumexp is None else on_t + grad_logsumexp), on_t


def _check(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float, label_smoothing: float
) -> None:
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be floats [rows, features], got {hidden.dtype} {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or not weight.shape[0]:
        raise ValueError(f"weight must be [vocabulary, {hidden.shape[1]}], got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"{name} must have the dtype of hidden, {hidden.dtype}, got {tensor.dtype}")
    if labels.shape != hidden.shape[:1] or labels.is_floating_point():
        raise ValueError(f"labels must be integers [{hidden.shape[0]}], got {labels.dtype} {tuple(labels.shape)}")
    if softcap < 0.0:
        raise ValueError(f"softcap must be >= 0 (0 for none), got {softcap}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")


def _mean_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float) -> Tensor:
    """The mean over the vocabulary of each row's logits, float32 [N]."""
    if not softcap:  # it is linear
        mean = torch.mv(hidden.float(), weight.mean(0, dtype=torch.float32))
        return scale * (mean if bias is None else mean + bias.mean(dtype=torch.float32))
    chunk = max(1, WORKSPACE["cuda"] // weight.shape[0])
    parts = [_logits(part, weight, bias, scale, softcap).mean(1) for part in hidden.split(chunk)]
    return torch.cat(parts)


def _forward_cuda(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    if not runs_kernels(hidden):
        return linear_cross_entropy_reference(hidden, weight, bias, labels, scale, softcap, label_smoothing)
    from cggr_compile.kernels.linear_cross_entropy import loss_triton
    from cggr_compile.ops.score import SPAN, score_partials

    _check(hidden, weight, bias, labels, softcap, label_smoothing)
    partials = score_partials(hidden, weight, bias, scale, softcap, SPAN)
    mean = _mean_logits(hidden, weight, bias, scale, softcap) if label_smoothing else None
    return loss_triton(partials, hidden, weight, bias, labels, mean, scale, softcap, label_smoothing)


def _backward_cuda(
    grad_loss: Tensor, grad_logsumexp: Tensor | None, hidden: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    if not runs_kernels(hidden):
        return linear_cross_entropy_backward_reference(grad_loss, grad_logsumexp, hidden, *rest)
    from cggr_compile.kernels.linear_cross_entropy import logit_gradient_triton

    weight, bias, labels, logsumexp, scale, softcap, label_smoothing, output_mask = rest
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    factors = _factors(grad_loss, grad_logsumexp, labels, weight.shape[0])

    def logit_gradient(part: slice, into: Tensor) -> None:
        logit_gradient_triton(
            hidden, weight, bias, labels, logsumexp, *factors, scale, softcap, label_smoothing, part, into
        )

    return _multiply_out(logit_gradient, hidden, weight, output_mask, WORKSPACE["cuda"])


def _fake(hidden: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    loss, logsumexp = (hidden.new_empty(hidden.shape[0], dtype=_wide(hidden.dtype)) for _ in range(2))
    return loss, logsumexp


def _fake_backward(
    grad_loss: Tensor, grad_logsumexp: Tensor | None, hidden: Tensor, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    with_hidden, with_weight, with_bias = rest[-1]
    return (
        hidden.new_empty(hidden.shape if with_hidden else 0),
        weight.new_empty(weight.shape if with_weight else 0),
        weight.new_empty(weight.shape[0] if with_bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale, softcap, label_smoothing = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.settings = (scale, softcap, label_smoothing)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, grad_logsumexp: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None and grad_logsumexp is None:
        return (None,) * 7
    *_, logsumexp = ctx.saved_tensors
    grad_loss = torch.zeros_like(logsumexp) if grad_loss is None else grad_loss
    wanted = list(ctx.needs_input_grad[:3])
    found = linear_cross_entropy_backward(grad_loss, grad_logsumexp, *ctx.saved_tensors, *ctx.settings, wanted)
    gradients = (gradient if want else None for gradient, want in zip(found, wanted, strict=True))
    return (*gradients, None, None, None, None)


linear_cross_entropy = define_opaque(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float scale, float softcap,"
    " float label_smoothing) -> (Tensor, Tensor)",
    linear_cross_entropy_reference,
    _fake,
)
linear_cross_entropy_backward = define_opaque(
    "linear_cross_entropy_backward(Tensor grad_loss, Tensor? grad_logsumexp, Tensor hidden, Tensor weight,"
    " Tensor? bias, Tensor labels, Tensor logsumexp, float scale, float softcap, float label_smoothing,"
    " bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    linear_cross_entropy_backward_reference,
    _fake_backward,
)
torch.library.register_autograd("cggr::linear_cross_entropy", _backward, setup_context=_setup_context, lib=LIBRARY)
# importing Triton waits for the first call on a device
LIBRARY.impl("linear_cross_entropy", _forward_cuda, "CUDA")
LIBRARY.impl("linear_cross_entropy_backward", _backward_cuda, "CUDA")
