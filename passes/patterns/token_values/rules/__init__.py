"""The rules of operators that work position by position, in a file for each kind; importing this registers them."""

from cggr_compile.passes.patterns.token_values.rules import (
    along,
    head_values,
    losses,
    picks,
    pointwise,
    products,
    views,
)

__all__ = ["along", "head_values", "losses", "picks", "pointwise", "products", "views"]
