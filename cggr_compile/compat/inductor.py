"""Inductor: compiling with it, its settings, and its cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule

from cggr_compile.compat.devices import TORCH_VERSION
from cggr_compile.compat.partition import quick_minimum_cuts


def compile_fx(gm: GraphModule, inputs: Sequence[Any], config_patches: dict[str, Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx as inductor_compile_fx

    with quick_minimum_cuts():
        compiled: Any = inductor_compile_fx(gm, list(inputs), config_patches=config_patches)
    return compiled  # type: ignore[no-any-return]


def inductor_modes() -> dict[str, dict[str, Any]]:
    """Inductor's settings for each ``torch.compile`` mode."""
    return {mode: dict(settings) for mode, settings in torch._inductor.list_mode_options().items()}


def inductor_option_names() -> set[str]:
    from torch._inductor import config

    return set(config.get_config_copy())


CUDA_GRAPHS = "triton.cudagraphs"  # Inductor's name of the setting


def uses_cuda_graphs(patches: dict[str, Any]) -> bool:
    """Whether Inductor replays CUDA graphs under these settings and the global ones."""
    from torch._inductor import config

    return bool(patches.get(CUDA_GRAPHS, config.triton.cudagraphs))


def fusion_limit(pairs: int) -> dict[str, int]:
    """The setting for how many readers of a buffer Inductor tries to fuse each of them with: at most ``pairs``."""
    from torch._inductor import config

    name = "max_fusion_buffer_group_pairwise_attempts"
    return {name: min(pairs, config.max_fusion_buffer_group_pairwise_attempts)}


def user_joint_passes() -> tuple[Callable[..., Any], ...]:
    """The pass or passes the user set as ``torch._inductor.config.joint_custom_pre_pass``."""
    return _user_passes("joint_custom_pre_pass")


def user_post_grad_passes() -> tuple[Callable[..., Any], ...]:
    """The pass or passes the user set as ``torch._inductor.config.post_grad_custom_post_pass``."""
    return _user_passes("post_grad_custom_post_pass")


def _user_passes(setting: str) -> tuple[Callable[..., Any], ...]:
    from torch._inductor import config

    value = getattr(config, setting)
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def custom_graph_pass() -> type:
    from torch._inductor.custom_graph_pass import CustomGraphPass

    return CustomGraphPass


def inductor_cache_dir() -> Path:
    """Where Inductor keeps compiled graphs (the variable TORCHINDUCTOR_CACHE_DIR, or a folder of the user's)."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def hash_of_files(paths: Iterable[Path]) -> str:
    """Another text for other contents of the files, in their order, and under another release of PyTorch."""
    from torch._inductor.custom_graph_pass import get_hash_for_files

    return get_hash_for_files(tuple(map(str, paths)), TORCH_VERSION).hex()


def sort_stably(graph: Graph) -> None:
    """Put every node behind its inputs again, otherwise keeping the order.

    Raises:
        AssertionError: a node needs itself.
    """
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)
