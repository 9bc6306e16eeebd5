"""CUDA graphs: those that Inductor records, and the recording of one's own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch


def same_addresses(tensors: Sequence[Any], addresses: list[int], positions: list[int]) -> bool:
    """Whether each tensor at one of ``positions`` is where ``addresses`` has it."""
    check = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
    if check is not None:  # PyTorch for CUDA
        return bool(check(list(tensors), addresses, positions))
    return all(tensors[i].data_ptr() == addresses[i] for i in positions)


def apply_function(function: Any, *args: Any) -> Any:
    """``function.apply`` of an autograd function, without functorch's look at each of hundreds of arguments."""
    return super(torch.autograd.Function, function).apply(*args)


def own_cublas_workspace() -> AbstractContextManager[None]:
    """Around the recording of a CUDA graph: cuBLAS takes its workspace from the graph's memory, and it stays there.

    Otherwise the graph would hold the address of one that PyTorch keeps for the stream, and frees with the next graph
    that Inductor records.
    """
    from torch._inductor.cudagraph_trees import clear_cublas_manager

    return clear_cublas_manager()


def reset_cuda_graphs() -> None:
    """Drop the CUDA graphs that Inductor has recorded, and their memory."""
    if "torch._inductor.cudagraph_trees" in sys.modules:
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


def cuda_graphs_restart(device: torch.device) -> Callable[[], None]:
    """What lets the next compiled call replay from the root of the device's CUDA graphs, as a new training step does.

    It does nothing without CUDA graphs, nor in the middle of a step: there values of the step would be overwritten.
    """
    if device.type != "cuda" or "torch._inductor.cudagraph_trees" not in sys.modules:
        return lambda: None
    from torch._inductor.cudagraph_trees import MarkStepBox, get_manager

    index = torch.cuda.current_device() if device.index is None else device.index
    manager = get_manager(index, create_if_none_exists=False)
    if manager is None or not manager.can_start_new_generation():
        return lambda: None

    def restart() -> None:
        # marking a step ends PyTorch's own counting for good, so only where the user marks them
        if MarkStepBox.mark_step_counter:
            torch.compiler.cudagraph_mark_step_begin()
        else:
            torch._dynamo.mutation_guard.GenerationTracker.generation += 1

    return restart
