"""The operators that rows go through. A new one is one decorated class, in the file whose kind of operator it is."""

from cggr_compile.passes.joint.row_sparse.rule import RULES, Rule, rule, rule_for_class, rule_of
from cggr_compile.passes.joint.row_sparse.rules import (  # noqa: F401  (each registers its rules)
    elementwise,
    experts,
    markers,
    products,
    reductions,
    views,
    writes,
)

__all__ = ["RULES", "Rule", "rule", "rule_for_class", "rule_of"]
