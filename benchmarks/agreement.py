"""The dense arms must compute the same thing, or comparing their times means nothing."""

from __future__ import annotations

from torch import Tensor
from transformers import LlamaForCausalLM

# largest relative errors: of the loss, of the first layer's gradient
TOLERANCE = {"float32": (1e-5, 1e-3), "bfloat16": (2e-3, 1e-1)}


class Disagreement(Exception):
    """Two arms that must compute the dense model differ by more than rounding."""


def first_layer_gradient(model: LlamaForCausalLM) -> list[Tensor]:
    """Of the parameters that are trained, of experts the first; copies on the CPU, where they take no device memory."""
    trained = (p for p in model.model.layers[0].parameters() if p.requires_grad)
    return [(p.grad if p.dim() < 3 else p.grad[0]).to("cpu", copy=True) for p in trained]


def check_dense(losses: dict[str, float], gradients: dict[str, list[Tensor]], dtype: str) -> None:
    """Compare every arm with the first one.

    The loss alone would not do: with random weights it is about log(vocabulary) whatever the attention sees.

    Raises:
        Disagreement: naming the arms.
    """
    first = next(iter(losses), "")
    loss_tolerance, gradient_tolerance = TOLERANCE[dtype]
    for arm, loss in losses.items():
        if not abs(loss - losses[first]) <= loss_tolerance * losses[first]:
            raise Disagreement(f"loss of {arm} {loss}, of {first} {losses[first]}")
        error = relative_error(gradients[arm], gradients[first])
        if not error <= gradient_tolerance:
            raise Disagreement(f"gradient of the first layer: {arm} is {error:.1e} away from {first}")


def relative_error(got: list[Tensor], want: list[Tensor]) -> float:
    """Norm of the difference over the norm of ``want``, over all the tensors together."""
    difference = sum(float((g.double() - w.double()).square().sum()) for g, w in zip(got, want, strict=True))
    return float((difference / sum(float(w.double().square().sum()) for w in want)) ** 0.5)
