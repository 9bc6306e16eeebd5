"""cggr_compile: a ``torch.compile`` backend that back-propagates only where it pays."""

from cggr_compile.explain import explain
from cggr_compile.options import Options
from cggr_compile.reference_loss import with_reference_loss
from cggr_compile.report import Explanation
from cggr_compile.runtime import Runtime, runtime
from cggr_compile.train_step import train_step
from cggr_compile.verify import VerificationError

__version__ = "0.1.0"
__all__ = [
    "Explanation",
    "Options",
    "Runtime",
    "VerificationError",
    "explain",
    "runtime",
    "train_step",
    "with_reference_loss",
]
