"""``cggr::place_token_values``: values of ``cggr::token_log_probs``, exact everywhere, differentiated at some rows.

The values have been computed; their gradient needs no product in the forward pass, only the hidden states of the rows
(``cggr::head_gradients`` recomputes the rest). ``cggr::place_values`` does it for values of any kind, which it is given
of the rows once more. Where the rows are known before the values, ``cggr::token_log_probs`` takes them itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cggr_compile.ops.library import LIBRARY, define_opaque
from cggr_compile.ops.token_log_probs import values_backward

Placed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def place_token_values_reference(
    log_prob: Tensor,
    entropy: Tensor,
    logsumexp: Tensor,
    log_sum_squares: Tensor,
    mean_logit: Tensor,
    labels: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    index: Tensor,
    factors: Tensor,
    scale: float,
    softcap: float,
) -> Placed:
    """The first five arguments, with the gradient of some of their entries.

    The gradient of ``hidden``, ``weight`` and ``bias`` is that of the values at the entries ``index`` times
    ``factors``, as if the values of these had been computed of ``hidden``; the five have none.

    Args:
        log_prob, entropy, logsumexp: of all positions, of one shape, as of ``cggr::token_log_probs``; its arguments
            were ``labels`` (integers of that shape), ``weight`` [V, H], ``bias`` [V] or None, ``scale``, ``softcap``.
        log_sum_squares, mean_logit: the same; empty where they were not wanted.
        hidden: [B, K, H], the hidden states of the rows.
        index: int64 [B, K], for each row the entry of the flattened values.
        factors: float32 [B, K]; 0 for a slot that is not used, whose row counts nothing.
    """
    return log_prob.clone(), entropy.clone(), logsumexp.clone(), log_sum_squares.clone(), mean_logit.clone()


def _fake(*arguments: Any) -> Placed:
    one, two, three, four, five = (torch.empty_like(values) for values in arguments[:5])
    return one, two, three, four, five


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Placed) -> None:
    _, entropy, logsumexp, log_squares, mean, labels, *tensors, scale, softcap = inputs
    ctx.save_for_backward(*tensors, labels, logsumexp, entropy, log_squares)
    given = [log_squares.shape == labels.shape, mean.shape == labels.shape]
    ctx.given = (True, True, True, *given)
    ctx.settings = (scale, softcap, False)  # nearly all rows have a label
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, index, factors, *kept = ctx.saved_tensors
    grads = tuple(grad if given else None for grad, given in zip(grads, ctx.given, strict=True))
    if all(grad is None for grad in grads):
        return (None,) * 13
    index, factors = index.reshape(-1), factors.reshape(-1)

    def at_rows(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.reshape(-1)[index]

    kept = [*map(at_rows, kept[:3]), at_rows(kept[3]) if ctx.given[3] else None]
    wanted = ctx.needs_input_grad[6:9]
    flat = hidden.reshape(-1, hidden.shape[-1])
    found = values_backward([at_rows(g) for g in grads], flat, weight, bias, kept, factors, ctx.settings, wanted)
    d_hidden = None if found[0] is None else found[0].view(hidden.shape)
    return (*(None,) * 6, d_hidden, *found[1:], *(None,) * 4)


place_token_values = define_opaque(
    "place_token_values(Tensor log_prob, Tensor entropy, Tensor logsumexp, Tensor log_sum_squares, Tensor mean_logit,"
    " Tensor labels, Tensor hidden, Tensor weight, Tensor? bias, Tensor index, Tensor factors, float scale,"
    " float softcap) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    place_token_values_reference,
    _fake,
)
torch.library.register_autograd("cggr::place_token_values", _backward, setup_context=_setup, lib=LIBRARY)
