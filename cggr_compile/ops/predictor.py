"""``cggr::predict`` and ``cggr::fit``: a small network that predicts how large a token's gradient is, and its training.

A token's gradient is ``g = ||softmax - onehot(label)||``, in [0, sqrt(2)]. The network sees the hidden state of some
block and the label's row of the head, each scaled to a root mean square of 1, and adds a linear function of them, which
is learned within a few steps, to one hidden layer. It never sees the logits, so it costs a thousandth of what they do.

All that there is of it is one float32 vector: decayed sums, the number of its steps, parameters, and Adam's two moments
(arXiv 1412.6980). A step takes one and returns the next, so that whatever is run again is the same again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cggr_compile.ops.head_gradients import wide
from cggr_compile.ops.library import define_composite

# columns of the first layer: a linear unit, which is added to the output, and tanh units
WIDTH = 32
# Adam's, of the first layer's n features: 1 / n, as each of its steps moves all of them at once; and of the rest
LEARNING_RATE = 1e-3
_BETA1, _BETA2, _EPSILON = 0.9, 0.99, 1e-8
# of the sums, from one step to the next: they are about the last 20 steps
_DECAY = 0.95
# sums over the rows that carried loss, each step's weights w adding up to 1: of w, w f, w g, w f^2, w g^2 and w f g
SUMS = 6
_STEPS = SUMS  # where the number of steps is
_BEGIN = SUMS + 1  # and the parameters begin
_LARGEST = math.sqrt(2.0)
_SMALLEST_NORM = 1e-2  # a row below it is nearly zeros, and stays so
_SEED = 0x5EED


def predictor_shapes(features: int) -> tuple[tuple[int, ...], ...]:
    """Of the parameters: first layer, its bias, second layer. ``features``: of both inputs together."""
    return (features, WIDTH), (WIDTH,), (WIDTH - 1,)


def predictor_size(features: int) -> int:
    """How many numbers there are of a network, with all that belongs to its training."""
    return _BEGIN + 3 * sum(map(math.prod, predictor_shapes(features)))


def new_predictor(features: int) -> Tensor:
    """float32, on the CPU: an untrained network, always the same one. Until it is trained it predicts 1 everywhere."""
    state = torch.zeros(predictor_size(features))
    generator = torch.Generator().manual_seed(_SEED)
    first = _parameters(state, features)[0]
    first[:, 1:] = torch.randn(features, WIDTH - 1, generator=generator) / math.sqrt(features)
    return state


def _parameters(state: Tensor, features: int) -> list[Tensor]:
    """Views of the parameters."""
    shapes = predictor_shapes(features)
    sizes = [math.prod(shape) for shape in shapes]
    flat = state.narrow(0, _BEGIN, sum(sizes))
    return [each.view(shape) for each, shape in zip(flat.split(sizes), shapes, strict=True)]


def parameters_of(state: Tensor) -> Tensor:
    """A view of all parameters, flat."""
    return state[_BEGIN:].tensor_split(3)[0]


def with_parameters(state: Tensor, parameters: Tensor) -> Tensor:
    """A copy with others in their place."""
    end = _BEGIN + parameters.numel()
    return torch.cat([state[:_BEGIN], parameters, state[end:]])


def predict_reference(predictor: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The gradient's norm that is expected at every position, float32 [B, S], in [0, sqrt(2)].

    The network's output f is brought onto the scale of what was found at the rows that carried loss: mean g + b (f -
    mean f), where b = cov(f, g) / var(f) is the slope of the regression. So a network that knows nothing yet gives
    all positions the same.

    Args:
        predictor: float32 [:func:`predictor_size`], a network with H + E features.
        hidden: [B, S, H], floats. weight: [V, E], floats. labels: integers [B, S]; one outside [0, V) is taken for 0.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        found, _, _ = _output(predictor, *_inputs(hidden, weight, labels))
        total, mean_f, mean_g, var_f, _, cov = _moments(predictor)
        slope = (cov / var_f.clamp(min=1e-12)).clamp(min=0.0)
        expected = (mean_g + slope * (found - mean_f)).clamp(0.0, _LARGEST)
        return torch.where(total > 0.0, expected, 1.0)


def fit_reference(
    predictor: Tensor, hidden: Tensor, weight: Tensor, labels: Tensor, norms: Tensor, weights: Tensor
) -> Tensor:
    """The predictor after one step of Adam on the squared error of ``norms``, weighted; a new vector.

    Without a row of positive weight it stays as it is. Rows of which something is not finite, as after an overflow in
    float16, count nothing.

    Args:
        predictor: float32 [:func:`predictor_size`]. weight: [V, E].
        hidden: [B, K, H], the hidden states of the rows that carry loss. labels: integers [B, K], their labels.
        norms: float [B, K], their g. weights: float32 [B, K], 1 / p, 0 at an unused slot.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        own, label = _inputs(hidden.flatten(0, 1), weight, labels.flatten())
        norms, weights = norms.flatten().float(), weights.flatten()
        found, inner, second = _output(predictor, own, label)
        counts = (weights > 0.0) & norms.isfinite() & found.isfinite()
        share = torch.where(counts, weights, 0.0)
        total = share.sum()
        share = share / total.clamp(min=1e-12)
        norms, found = torch.where(counts, norms, 0.0), torch.where(counts, found, 0.0)

        error = (2.0 * share * (found - norms))[:, None]
        of_units = torch.cat([error, error * second * (1.0 - inner.square())], 1)
        factor = of_units.to(own.dtype)
        first = torch.cat([(own.t() @ factor).float(), (label.t() @ factor).float()])
        gradients = [first, of_units.sum(0), (inner * error).sum(0)]
        gradient = torch.cat([each.flatten() for each in gradients])

        steps = predictor[_STEPS : _STEPS + 1] + 1.0
        parameters, mean, square = predictor[_BEGIN:].chunk(3)
        mean = torch.lerp(gradient, mean, _BETA1)
        square = torch.lerp(gradient.square(), square, _BETA2)
        scale = (square / (1.0 - torch.exp(steps * math.log(_BETA2)))).sqrt() + _EPSILON
        direction = mean / (1.0 - torch.exp(steps * math.log(_BETA1))) / scale
        of_first, of_rest = direction.tensor_split([first.numel()])
        parameters = parameters - torch.cat([of_first / first.shape[0], LEARNING_RATE * of_rest])

        products = (torch.ones_like(found), found, norms, found.square(), norms.square(), found * norms)
        sums = _DECAY * predictor[:SUMS] + torch.stack([(share * each).sum() for each in products])
        return torch.where(total > 0.0, torch.cat([sums, steps, parameters, mean, square]), predictor)


def _inputs(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """What the network sees, each in the dtype that it multiplies in."""
    known = (labels >= 0) & (labels < weight.shape[0])
    rows = weight[torch.where(known, labels, 0)]
    return _scaled(hidden), _scaled(rows).to(_dtype(hidden))


def _dtype(values: Tensor) -> torch.dtype:
    """bfloat16 for float16 as well, whose range is too small for a sum over rows."""
    return torch.bfloat16 if values.dtype in (torch.bfloat16, torch.float16) else torch.float32


def _scaled(rows: Tensor) -> Tensor:
    """Rows of root mean square 1; zeros where one is not finite."""
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=wide(rows.dtype))
    factor = math.sqrt(rows.shape[-1]) / norm.clamp(min=_SMALLEST_NORM)
    return torch.where(norm.isfinite(), rows * factor.to(rows.dtype), 0.0).to(_dtype(rows))


def _output(predictor: Tensor, own: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the network says, float32; activations of its hidden layer; and its second layer."""
    first, bias, second = _parameters(predictor, own.shape[-1] + label.shape[-1])
    upper, lower = first.to(own.dtype).split([own.shape[-1], label.shape[-1]])
    units = (own @ upper).float() + (label @ lower).float() + bias
    inner = torch.tanh(units[..., 1:])
    return units[..., 0] + (inner * second).sum(-1), inner, second


def _moments(predictor: Tensor) -> tuple[Tensor, ...]:
    """Of the rows that carried loss lately: the sum of weights, means of f and g, variances of both, covariance."""
    total, f, g, ff, gg, fg = predictor[:SUMS].unbind()
    weight = total.clamp(min=1e-12)
    f, g = f / weight, g / weight
    var_f, var_g = ff / weight - f.square(), gg / weight - g.square()
    return total, f, g, var_f.clamp(min=0.0), var_g.clamp(min=0.0), fg / weight - f * g


def correlation(sums: Tensor) -> float | None:
    """Of predicted and true norms, over the rows that carried loss lately; None where there is none. ``sums``: [SUMS]
    of a predictor, or those of several added up."""
    total, _, _, var_f, var_g, cov = (float(each) for each in _moments(sums.double()))
    scale = math.sqrt(var_f * var_g)
    return max(-1.0, min(1.0, cov / scale)) if total > 0.0 and scale > 0.0 else None


def concentration(sums: Tensor) -> float | None:
    """(mean g)^2 / mean g^2 of the true norms, of sums as for :func:`correlation`; None where there is none."""
    total, _, g, _, gg, _ = sums.double().tolist()
    return min(1.0, g**2 / (total * gg)) if total * gg > 0.0 else None


predict = define_composite(
    "predict(Tensor predictor, Tensor hidden, Tensor weight, Tensor labels) -> Tensor", predict_reference
)
fit = define_composite(
    "fit(Tensor predictor, Tensor hidden, Tensor weight, Tensor labels, Tensor norms, Tensor weights) -> Tensor",
    fit_reference,
)
