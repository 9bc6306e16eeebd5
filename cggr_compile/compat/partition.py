"""AOTAutograd's joint graph, and how it is cut into a forward and a backward graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch.fx import GraphModule, Node

from cggr_compile.scoped_patch import ScopedPatch

# where AOTAutograd says which module a node computes, or the gradient of which
MODULE_STACKS = ("fwd_nn_module_stack", "nn_module_stack")


def aot_eager(gm: GraphModule, inputs: Sequence[Any], partition: Callable[..., Any]) -> Callable[..., Any]:
    """AOTAutograd with the given partition function, both halves run by plain PyTorch."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    def run_graph(graph: GraphModule, _inputs: Sequence[Any]) -> Callable[..., Any]:
        from functorch.compile import make_boxed_func

        return make_boxed_func(graph.forward)  # type: ignore[no-any-return]

    # Inductor's decompositions: the joint passes then see the same operators on either path
    compile_aot = aot_autograd(fw_compiler=run_graph, partition_fn=partition, decompositions=select_decomp_table())
    compiled: Any = compile_aot(gm, list(inputs))
    return compiled  # type: ignore[no-any-return]


def default_partition(joint: GraphModule, inputs: Any, **kwargs: Any) -> Any:
    from torch._functorch.partitioners import default_partition as partition

    return partition(joint, inputs, **kwargs)


def keep_in_backward(node: Node) -> None:
    """Tell the partitioner that a node must not be computed in the forward pass, and saved."""
    node.meta["partitioner_tag"] = "must_be_in_backward"


def quick_minimum_cuts() -> AbstractContextManager[None]:
    """Let the partitioner cut graphs with Boykov and Kolmogorov's algorithm, a tenth of preflow-push's time or less.

    The cut is the same: networkx takes the one nearest to the sink, whatever flow it found. The partitioner has no
    argument for the algorithm.
    """
    return _minimum_cut_patch()()


@functools.cache
def _minimum_cut_patch() -> ScopedPatch:
    import networkx

    def minimum_cut(usual: Callable[..., Any], graph: Any, source: Any, sink: Any, *args: Any, **kwargs: Any) -> Any:
        chosen = {} if args else {"flow_func": networkx.algorithms.flow.boykov_kolmogorov}
        return usual(graph, source, sink, *args, **{**chosen, **kwargs})

    return ScopedPatch(networkx, "minimum_cut", minimum_cut)


def minimum_partition(joint: GraphModule, inputs: Any, **kwargs: Any) -> tuple[GraphModule, GraphModule]:
    """The halves of a joint graph as Inductor cuts it: what is cheap is computed again and not kept."""
    from torch._functorch.partitioners import min_cut_rematerialization_partition as partition

    with quick_minimum_cuts():
        return partition(joint, inputs, compiler="inductor", **kwargs)
