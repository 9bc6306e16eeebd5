"""Products with quantised weights: other libraries' operators ``x -> x W^T``, on every position by itself."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from cggr_compile.passes.nodes import argument, shape_of

if TYPE_CHECKING:
    from torch.fx import Node

# bitsandbytes' (A [..., K], B, shapeB [N, K], absmax, ...) -> [..., N]
GEMM_4BIT = "bitsandbytes.gemm_4bit.default"


def is_quantised_product(node: Node) -> bool:
    return node.op == "call_function" and str(node.target) == GEMM_4BIT


def flops(node: Node) -> int:
    """Floating-point operations of such a product of static sizes."""
    shape: Any = argument(node, 2, "shapeB")
    return 2 * int(math.prod(shape_of(node))) * int(shape[1])
