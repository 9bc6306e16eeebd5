"""``cggr::token_log_probs``: what losses read of a head's logits, position by position, without keeping the logits.

The forward walks once over the vocabulary, as ``cggr::score`` does, and keeps a few numbers a position. The backward
recomputes the logits from them (``cggr::head_gradients``).

Both are operators whose implementation launches Triton kernels, not templates that Inductor times: of a product of
milliseconds the call costs little, and the same code serves eager mode, every backend, and CUDA graphs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cggr_compile.ops.head_gradients import (
    NO_MASS,
    WORKSPACE,
    head_gradients,
    known_labels,
    labelled_first,
    logits_of,
    wide,
)
from cggr_compile.ops.library import LIBRARY, define_opaque, runs_kernels

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
Values = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def token_log_probs_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    row_hidden: Tensor | None,
    rows: Tensor | None,
    weights: Tensor | None,
    scale: float,
    softcap: float,
    squares: bool,
    mean: bool,
    pack: bool,
) -> Values:
    """Values per position of ``p = softmax(z)``, ``z = softcap * tanh(scale * (h W^T + b) / softcap)``.

    A position whose label is outside [0, V) (such as -100) has 0 in all of them, and no gradient. All but the last are
    differentiable, once.

    Without ``rows`` the gradient goes to ``hidden`` at every labelled position, to ``weight`` and to ``bias``. With
    ``rows`` the values are exact all the same, but the backward takes their gradient at those positions only, times
    ``weights``, and hands it to ``row_hidden``, ``weight`` and ``bias``; ``hidden`` gets none. So a pass calls it with
    the final norm's output at all positions, detached, and with that at the selected rows, which it computes from
    ``cggr::gather_rows`` of the last block's output::

        h = norm(gather_rows(x, rows, keep))                                 # [B, K, H], differentiable
        log_prob, entropy, *_ = token_log_probs(norm(x.detach()), w, None, labels, h, rows, weights, ...)  # [B, S]

    Any function of the values is then reported exactly. Its gradient is the exact one if ``rows`` have all positions
    where it is not zero and weights 1, and an unbiased one if ``rows`` are a sample and ``weights`` 1 / p.

    Args:
        hidden: [B, S, H] or [N, H]. weight: [V, H]. bias: [V] or None. One float dtype.
        labels: integers, [B, S] or [N], aligned with hidden (position t has the label that t predicts).
        row_hidden: [B, K, H] (or [K, H]), what hidden is at ``rows``. Only together with the next two; None: no rows.
        rows: int64 [B, K] (or [K]), positions in [0, S).
        weights: float32 [B, K] (or [K]), factor on the gradient; 0 at an unused slot, whose row counts nothing.
        scale: factor on the products. softcap: 0 for none.
        squares, mean: whether log_sum_squares and mean_logit are wanted; empty tensors otherwise.
        pack: whether positions without a label are left out of the work on a GPU: labelled ones are put first, and
            programs beyond their number, which stays on the device, do nothing. False is faster where nearly all have
            one. The result does not depend on it.

    Returns:
        log_prob of the label; entropy (nats); logsumexp of z; log_sum_squares, log sum_j p_j^2; mean_logit, the mean
        of z; top1_hit, 1 where no token's logit is above the label's. Of labels' shape, float32 (float64 for float64).

    Raises:
        ValueError: naming the argument whose shape, dtype or value does not fit.
    """
    check_head(hidden, weight, bias, labels, softcap)
    _check_rows(hidden, labels, row_hidden, rows, weights)
    flat = hidden.reshape(-1, hidden.shape[-1])
    known, safe = known_labels(labels.reshape(-1), weight.shape[0])
    found = _outputs(hidden, labels, squares, mean)
    for values in found:
        values.zero_()
    # nobody waits for a processor
    chosen = known.nonzero()[:, 0] if hidden.device.type == "cpu" else torch.arange(flat.shape[0], device=hidden.device)
    for part in chosen.split(max(1, WORKSPACE["cpu"] // weight.shape[0])):
        z = logits_of(flat[part], weight, bias, scale, softcap)
        picked = z.gather(1, safe[part][:, None])[:, 0]
        logsumexp = torch.logsumexp(z, 1)
        log_p = z - logsumexp[:, None]
        entropy = -(torch.exp(log_p) * log_p).sum(1)
        log_squares = torch.logsumexp(2.0 * log_p, 1) if squares else None
        mean_logit = z.mean(1) if mean else None
        hit = (picked >= z.amax(1)).to(z.dtype)
        for values, some in zip(
            found, (picked - logsumexp, entropy, logsumexp, log_squares, mean_logit, hit), strict=True
        ):
            if some is not None:
                values.view(-1)[part] = torch.where(known[part], some, 0.0)
    return found


def _outputs(hidden: Tensor, labels: Tensor, squares: bool, mean: bool) -> Values:
    shapes = [labels.shape if wanted else (0,) for wanted in (True, True, True, squares, mean, True)]
    one, two, three, four, five, six = (hidden.new_empty(shape, dtype=wide(hidden.dtype)) for shape in shapes)
    return one, two, three, four, five, six


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float) -> None:
    """Raises ValueError unless these fit together: hidden [..., H], weight [V, H], bias [V], labels [...]."""
    if hidden.dim() < 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be floats [..., rows, features], got {hidden.dtype} {tuple(hidden.shape)}")
    width = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width or not weight.shape[0]:
        raise ValueError(f"weight must be [vocabulary, {width}], got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"{name} must have the dtype of hidden, {hidden.dtype}, got {tensor.dtype}")
    if labels.shape != hidden.shape[:-1] or labels.dtype not in INTEGERS:
        raise ValueError(f"labels must be integers {list(hidden.shape[:-1])}, got {labels.dtype} {tuple(labels.shape)}")
    if not softcap >= 0.0:
        raise ValueError(f"softcap must be >= 0 (0 for none), got {softcap}")


def _check_rows(
    hidden: Tensor, labels: Tensor, row_hidden: Tensor | None, rows: Tensor | None, weights: Tensor | None
) -> None:
    if row_hidden is None and rows is None and weights is None:
        return
    if row_hidden is None or rows is None or weights is None:
        raise ValueError("row_hidden, rows and weights must be given together")
    slots = labels.shape[:-1]
    if rows.dtype != torch.int64 or rows.dim() != labels.dim() or rows.shape[:-1] != slots:
        raise ValueError(f"rows must be int64 {[*slots, 'rows']}, got {rows.dtype} {tuple(rows.shape)}")
    if weights.dtype != torch.float32 or weights.shape != rows.shape:
        raise ValueError(f"weights must be float32 {list(rows.shape)}, got {weights.dtype} {tuple(weights.shape)}")
    if row_hidden.dtype != hidden.dtype or row_hidden.shape != (*rows.shape, hidden.shape[-1]):
        wanted = [*rows.shape, hidden.shape[-1]]
        raise ValueError(
            f"row_hidden must be {hidden.dtype} {wanted}, got {row_hidden.dtype} {tuple(row_hidden.shape)}"
        )


def _forward_cuda(hidden: Tensor, *rest: Any) -> Values:
    if not runs_kernels(hidden):
        return token_log_probs_reference(hidden, *rest)
    from cggr_compile.kernels.token_log_probs import token_log_probs_triton

    weight, bias, labels, row_hidden, rows, weights, scale, softcap, squares, mean, pack = rest
    check_head(hidden, weight, bias, labels, softcap)
    _check_rows(hidden, labels, row_hidden, rows, weights)
    found = _outputs(hidden, labels, squares, mean)
    flat, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    packing = labelled_first(flat_labels, weight.shape[0]) if pack else None
    into = [values.view(-1) for values in found]
    with torch.cuda.device_of(hidden):
        token_log_probs_triton(flat, weight, bias, flat_labels, packing, scale, softcap, squares, mean, into)
    return found


def _fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any) -> Values:
    return _outputs(hidden, labels, *rest[-3:-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Values) -> None:
    hidden, weight, bias, labels, row_hidden, rows, weights, scale, softcap, squares, mean, pack = inputs
    _, entropy, logsumexp, log_squares, _, hit = output
    differentiated = hidden if rows is None else row_hidden
    ctx.save_for_backward(differentiated, weight, bias, labels, rows, weights, logsumexp, entropy, log_squares)
    ctx.wanted = (True, True, True, squares, mean)
    ctx.settings = (scale, softcap, pack and rows is None)  # of selected rows nearly all have a label
    ctx.mark_non_differentiable(hit)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = tuple(grad if wanted else None for grad, wanted in zip(grads[:5], ctx.wanted, strict=True))
    if all(grad is None for grad in grads):
        return (None,) * 12
    hidden, weight, bias, labels, rows, weights, logsumexp, entropy, log_squares = ctx.saved_tensors
    with_rows = rows is not None
    wanted = [ctx.needs_input_grad[4 if with_rows else 0], *ctx.needs_input_grad[1:3]]

    def at_rows(values: Any) -> Any:
        if values is None:
            return None
        return (values.gather(-1, rows) if with_rows else values).reshape(-1)

    log_squares = log_squares if ctx.wanted[3] else None
    kept = [at_rows(tensor) for tensor in (labels, logsumexp, entropy, log_squares)]
    flat = hidden.reshape(-1, hidden.shape[-1])
    factors = None if weights is None else weights.reshape(-1)
    found = values_backward([at_rows(g) for g in grads], flat, weight, bias, kept, factors, ctx.settings, wanted)
    d_hidden, d_weight, d_bias = found
    d_hidden = None if d_hidden is None else d_hidden.view(hidden.shape)
    of_hidden = (None, d_hidden) if with_rows else (d_hidden, None)
    return (of_hidden[0], d_weight, d_bias, None, of_hidden[1], *(None,) * 7)


def values_backward(
    grads: Sequence[Tensor | None],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kept: Sequence[Tensor | None],
    factors: Tensor | None,
    settings: tuple[float, float, bool],
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the hidden states, weight and bias, from those of the first five values of some positions.

    Args:
        grads: [N] each, None for a value that has no gradient.
        hidden: [N, H]. weight: [V, H]. bias: [V] or None.
        kept: labels [N] and, of the forward, logsumexp, entropy and log_sum_squares (None: not computed), [N].
        factors: float32 [N], on the gradient of each position; where one is 0, it counts nothing. None: ones.
        settings: scale, softcap and pack, see :func:`token_log_probs_reference`.
        wanted: which of the three gradients are; None for the others.
    """
    labels, logsumexp, entropy, log_squares = kept
    assert labels is not None and logsumexp is not None and entropy is not None
    used = known_labels(labels, weight.shape[0])[0]
    used = used if factors is None else used & (factors != 0)

    def upstream(grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        return torch.where(used, grad if factors is None else grad * factors, 0.0)

    logsumexp = torch.where(used, logsumexp, NO_MASS)
    of_logits = _factors([upstream(grad) for grad in grads], entropy, log_squares, weight.shape[0])
    found = head_gradients(hidden, weight, bias, labels, logsumexp, *of_logits, *settings, wanted)
    return [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]


def _factors(
    grads: Sequence[Tensor | None], entropy: Tensor, log_squares: Tensor | None, vocab: int
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """What ``cggr::head_gradients`` takes, from the gradients of the first five values.

    With H the entropy and Q = sum_j p_j^2, their gradients by z_j are: log_prob 1[j = label] - p_j; entropy
    -p_j (log p_j + H); logsumexp p_j; log_sum_squares 2 p_j (p_j / Q - 1); mean_logit 1 / V.
    """
    d_log_prob, d_entropy, d_logsumexp, d_log_squares, d_mean = grads
    on_p = torch.zeros_like(entropy)
    if d_log_prob is not None:
        on_p = on_p - d_log_prob
    if d_entropy is not None:
        on_p = on_p - d_entropy * entropy
    if d_logsumexp is not None:
        on_p = on_p + d_logsumexp
    if d_log_squares is not None:
        on_p = on_p - 2.0 * d_log_squares
    on_log_p = None if d_entropy is None else -d_entropy
    on_p2 = None
    if d_log_squares is not None and log_squares is not None:
        on_p2 = 2.0 * d_log_squares * torch.exp(-log_squares)
    on_label = torch.zeros_like(entropy) if d_log_prob is None else d_log_prob
    return on_p, on_log_p, on_p2, on_label, None if d_mean is None else d_mean / vocab


token_log_probs = define_opaque(
    "token_log_probs(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? row_hidden, Tensor? rows,"
    " Tensor? weights, float scale, float softcap, bool squares, bool mean, bool pack)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    token_log_probs_reference,
    _fake,
)
torch.library.register_autograd("cggr::token_log_probs", _backward, setup_context=_setup_context, lib=LIBRARY)
# importing Triton waits for the first call on a device
LIBRARY.impl("token_log_probs", _forward_cuda, "CUDA")
