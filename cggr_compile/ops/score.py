"""``cggr::score``: statistics of every row's next-token distribution, without keeping the logits.

Two steps, so that the compiler fuses what is small and the kernel does what is large: ``cggr::score_partials`` walks
once over the vocabulary and leaves four numbers per row and span of columns; the rest is arithmetic on those.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cggr_compile.ops.library import LIBRARY, define_composite, define_opaque, runs_kernels

CHUNK_LOGITS = 1 << 22  # about so many logits exist at a time on the CPU,
CACHED_LOGITS = 1 << 18  # and so many are looked at together: they fit a core's cache
COLUMNS = 64  # top-2 of a row: the best two groups of so many columns hold it
SPAN = 2048  # columns of the vocabulary that one program of the GPU kernel walks over
FP8 = torch.float8_e4m3fn


def score_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: float,
    softcap: float,
    fp8: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistics of ``p = softmax(z)``, ``z = softcap * tanh(scale * (h W^T + b) / softcap)``, per row.

    Args:
        hidden: [..., H], any float dtype.
        weight: [V, H], same dtype. bias: [V] or None.
        labels: int64 [...]; a label outside [0, V) (such as -100) scores label_logprob 0.
        scale: factor on the logits. softcap: 0 for none.
        fp8: multiply hidden and weight as 8-bit floats, each row with a scale of its own (:func:`to_fp8`).

    Returns:
        logsumexp, entropy (nats), top-1 and top-2 probability, log p(label): float32 [...] each. Equal top
        logits give equal probabilities (top1 == top2).
    """
    vocab = weight.shape[0]
    span = SPAN if hidden.is_cuda else vocab
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    (left, row_scale), (right, column_scale) = (to_fp8(m) if fp8 else (m, None) for m in (rows, weight))
    partials = score_partials(left, right, bias, scale, softcap, span, row_scale, column_scale)
    high, total, slope, second = partials.unbind(0)
    # merge the spans: sums are relative to each span's own maximum
    top = high.amax(0)
    factor = torch.exp(high - top)
    mass = (factor * total).sum(0)
    log_mass = torch.log(mass)
    entropy = log_mass - (factor * (slope + (high - top) * total)).sum(0) / mass
    best = high == top
    runner_up = torch.maximum(high.masked_fill(best, -torch.inf).amax(0), second.amax(0))
    runner_up = torch.where(best.sum(0) > 1, top, runner_up)
    known = (flat >= 0) & (flat < vocab)
    safe = torch.where(known, flat, 0)
    picked = (rows.float() * weight[safe].float()).sum(-1)
    if bias is not None:
        picked = picked + bias[safe].float()
    label_logprob = torch.where(known, _squash(picked, scale, softcap) - top - log_mass, 0.0)
    statistics = (top + log_mass, entropy, 1.0 / mass, torch.exp(runner_up - top) / mass, label_logprob)
    lse, entropy, top1, top2, label_logprob = (value.view(labels.shape) for value in statistics)
    return lse, entropy, top1, top2, label_logprob


def to_fp8(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``matrix`` [N, H] as float8_e4m3fn (arXiv 2209.05433), and the float32 factor [N] that restores each row.

    The largest entry of a row becomes the largest number there is, 448; a row of zeros stays one.
    """
    factor = matrix.abs().amax(1).float().clamp_min(1e-30) / torch.finfo(FP8).max
    return (matrix.float() / factor[:, None]).to(FP8), factor


def _squash(products: Tensor, scale: float, softcap: float) -> Tensor:
    """The logits, float32, from the head's products."""
    logits = products.float() * scale
    return torch.tanh(logits / softcap) * softcap if softcap else logits


def score_partials_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float,
    span: int,
    row_scale: Tensor | None = None,
    column_scale: Tensor | None = None,
) -> Tensor:
    """The logits z of ``score``, summed up over each span of columns.

    Args:
        hidden: [N, H]. weight: [V, H]. bias: [V] or None. span: columns per part, >= 1.
        row_scale, column_scale: float32 [N] and [V], what the product of ``hidden`` and ``weight`` is multiplied
            with; both or neither. Needed where those are float8_e4m3fn.

    Returns:
        float32 [4, ceil(V / span), N]: the maximum m of the part; sum of exp(z - m); sum of exp(z - m) (z - m);
        the second-highest z (equal to m at a tie, -inf in a part of one column).
    """
    parts = -(-weight.shape[0] // span)
    found = hidden.new_empty(4, parts, hidden.shape[0], dtype=torch.float32)
    chunk = max(1, CHUNK_LOGITS // min(span, weight.shape[0]))
    piece = max(1, CACHED_LOGITS // min(span, weight.shape[0]))
    if row_scale is not None and column_scale is not None:  # a processor has no products of 8-bit floats
        hidden, weight = (m.float() * factor[:, None] for m, factor in ((hidden, row_scale), (weight, column_scale)))
        bias = None if bias is None else bias.float()
    for part in range(parts):
        columns = slice(part * span, (part + 1) * span)
        part_bias = None if bias is None else bias[columns]
        for begin in range(0, hidden.shape[0], chunk):
            raw = torch.nn.functional.linear(hidden[begin : begin + chunk], weight[columns], part_bias)
            for low in range(0, raw.shape[0], piece):
                logits = _squash(raw[low : low + piece], scale, softcap)
                rows = slice(begin + low, begin + low + logits.shape[0])
                _sum_up(logits, found[:, part, rows])
    return found


def _sum_up(logits: Tensor, into: Tensor) -> None:
    """One part's statistics of ``logits`` [n, columns] into ``into`` [4, n]."""
    into[0], into[3] = _top2(logits).unbind(1)
    probability = torch.softmax(logits, -1)
    into[1] = 1.0 / probability.amax(-1)
    into[2] = into[1] * (torch.linalg.vecdot(probability, logits) - into[0])


def _top2(logits: Tensor) -> Tensor:
    """[n, 2]: the two highest of each row; topk over all columns would take longer than everything else here."""
    size, columns = logits.shape
    if columns < 2 * COLUMNS:
        padded = torch.nn.functional.pad(logits, (0, max(0, 2 - columns)), value=-torch.inf)
        return padded.topk(2, -1).values
    groups = columns // COLUMNS
    grouped = logits[:, : groups * COLUMNS].unflatten(1, (groups, COLUMNS))
    best = grouped.amax(-1).topk(2, -1).indices
    candidates = grouped.gather(1, best[:, :, None].expand(-1, -1, COLUMNS)).reshape(size, 2 * COLUMNS)
    return torch.cat([candidates, logits[:, groups * COLUMNS :]], 1).topk(2, -1).values


def _fake_partials(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float, span: int, *_: Tensor | None
) -> Tensor:
    return hidden.new_empty(4, -(-weight.shape[0] // span), hidden.shape[0], dtype=torch.float32)


def _score_partials_cuda(hidden: Tensor, *arguments: object) -> Tensor:
    if not runs_kernels(hidden):
        return score_partials_reference(hidden, *arguments)  # type: ignore[arg-type]
    from cggr_compile.kernels.score import score_partials_triton

    return score_partials_triton(hidden, *arguments)  # type: ignore[arg-type]


score_partials = define_opaque(
    "score_partials(Tensor hidden, Tensor weight, Tensor? bias, float scale, float softcap, int span,"
    " Tensor? row_scale=None, Tensor? column_scale=None) -> Tensor",
    score_partials_reference,
    _fake_partials,
)
# importing Triton waits for the first call on a device
LIBRARY.impl("score_partials", _score_partials_cuda, "CUDA")
score = define_composite(
    "score(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, float scale, float softcap, bool fp8=False)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    score_reference,
)
