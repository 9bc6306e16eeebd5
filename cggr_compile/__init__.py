"""cggr_compile: a ``torch.compile`` backend that back-propagates only where it pays."""

from cggr_compile.advise import Advice, advise
from cggr_compile.explain import explain
from cggr_compile.explanation import Explanation
from cggr_compile.flash_attention import enable_flash_attention, load_model_with_flash_attention
from cggr_compile.metrics_logger import MetricsLogger
from cggr_compile.modules.loss import CGGRLoss
from cggr_compile.modules.model import CGGRModel
from cggr_compile.modules.moe import PersistentTRMLP, create_persistent_tr_mlp
from cggr_compile.modules.router import TruncatedRouter, create_truncated_router
from cggr_compile.modules.scorer import CGGRScorer
from cggr_compile.modules.token_log_probs import TokenLogProbs, token_log_probs
from cggr_compile.options import Options
from cggr_compile.reference_loss import with_reference_loss
from cggr_compile.registry import runtime
from cggr_compile.runtime import Runtime
from cggr_compile.train_step import train_step
from cggr_compile.verify import VerificationError

__version__ = "0.2.0"
__all__ = [
    "Advice",
    "CGGRLoss",
    "CGGRModel",
    "CGGRScorer",
    "Explanation",
    "MetricsLogger",
    "Options",
    "PersistentTRMLP",
    "Runtime",
    "TokenLogProbs",
    "TruncatedRouter",
    "VerificationError",
    "advise",
    "create_persistent_tr_mlp",
    "create_truncated_router",
    "enable_flash_attention",
    "explain",
    "load_model_with_flash_attention",
    "runtime",
    "token_log_probs",
    "train_step",
    "with_reference_loss",
]
