"""cggr_compile: a ``torch.compile`` backend that back-propagates only where it pays."""

from cggr_compile.explain import explain
from cggr_compile.modules.moe import PersistentTRMLP, create_persistent_tr_mlp
from cggr_compile.options import Options
from cggr_compile.report import Explanation
from cggr_compile.runtime import Runtime, runtime
from cggr_compile.train_step import train_step
from cggr_compile.verify import VerificationError

__version__ = "0.1.0"
__all__ = [
    "Explanation",
    "Options",
    "PersistentTRMLP",
    "Runtime",
    "VerificationError",
    "create_persistent_tr_mlp",
    "explain",
    "runtime",
    "train_step",
]
