"""How Inductor generates code for the ``cggr`` operators that it can do better than call.

Without a lowering an operator is a call through the dispatcher into Python, about 0.4 ms of the host's time for the
two kernels of ``attention_rows_backward``; a launch in generated code takes a tenth of that.
"""

from __future__ import annotations

from functools import cache

from cggr_compile import compat
from cggr_compile.lowerings.attention_rows import lower_attention_rows_backward
from cggr_compile.lowerings.concat_in_place import lower_concat_in_place, lower_materialize
from cggr_compile.lowerings.fusion_barrier import lower_fusion_barrier
from cggr_compile.lowerings.moe import lower_moe_mlp, lower_moe_mlp_backward
from cggr_compile.lowerings.moe_clamped import lower_moe_clamped_mlp, lower_moe_clamped_mlp_backward
from cggr_compile.lowerings.score import lower_score_partials
from cggr_compile.ops.attention_rows import attention_rows_backward
from cggr_compile.ops.concat_in_place import concat_in_place, materialize
from cggr_compile.ops.moe import moe_mlp, moe_mlp_backward
from cggr_compile.ops.moe_clamped import moe_clamped_mlp, moe_clamped_mlp_backward
from cggr_compile.ops.rows import fusion_barrier
from cggr_compile.ops.score import score_partials


@cache
def register() -> None:
    """Makes Inductor use these lowerings. Only operators of our own are concerned."""
    compat.register_inductor_lowering(attention_rows_backward, lower_attention_rows_backward)
    compat.register_inductor_lowering(concat_in_place, lower_concat_in_place)
    compat.register_inductor_lowering(materialize, lower_materialize)
    compat.register_inductor_lowering(fusion_barrier, lower_fusion_barrier)
    compat.register_inductor_lowering(score_partials, lower_score_partials, eager_strides=True)
    compat.register_inductor_lowering(moe_mlp, lower_moe_mlp, eager_strides=True)
    compat.register_inductor_lowering(moe_mlp_backward, lower_moe_mlp_backward, eager_strides=True)
    compat.register_inductor_lowering(moe_clamped_mlp, lower_moe_clamped_mlp, eager_strides=True)
    compat.register_inductor_lowering(moe_clamped_mlp_backward, lower_moe_clamped_mlp_backward, eager_strides=True)
