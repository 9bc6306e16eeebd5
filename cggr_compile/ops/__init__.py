"""The ``torch.ops.cggr`` operators. Importing this package registers them; one operator family per file.

The eager implementation of an operator is its specification. Operators that later lower to kernels
(``score``) are opaque to the compiler; the others decompose into ATen so that the compiler fuses them.
"""

from cggr_compile.ops import (
    attention_rows,
    carry,
    check_labels,
    concat_in_place,
    context,
    detach_unselected,
    difficulty,
    hardest,
    head_gradients,
    inclusion,
    linear_cross_entropy,
    metrics,
    moe,
    moe_clamped,
    moe_routing,
    moe_steps,
    place_token_values,
    place_values,
    rows,
    sample,
    score,
    score_logits,
    slots,
    token_log_probs,
    uniform,
)
from cggr_compile.ops.detach_unselected import UnresolvedMarkerError

__all__ = [
    "UnresolvedMarkerError",
    "attention_rows",
    "carry",
    "check_labels",
    "concat_in_place",
    "context",
    "detach_unselected",
    "difficulty",
    "hardest",
    "head_gradients",
    "inclusion",
    "linear_cross_entropy",
    "metrics",
    "moe",
    "moe_clamped",
    "moe_routing",
    "moe_steps",
    "place_token_values",
    "place_values",
    "rows",
    "sample",
    "score",
    "score_logits",
    "slots",
    "token_log_probs",
    "uniform",
]
