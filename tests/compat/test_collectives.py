"""Inductor's kernels in the order of the graph."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

from cggr_compile.compat.collectives import in_graph_order


@dataclass(eq=False)
class Kernel:
    """Stands where the graph has its first operator, and makes one buffer."""

    name: str
    min_order: int
    reads: tuple[str, ...] = field(default=())

    def get_buffer_names(self):
        return {self.name}

    @property
    def unmet_dependencies(self):
        return [SimpleNamespace(name=name) for name in self.reads]


def depth_first(kernels):
    """As Inductor leaves them: what a kernel reads stands right before it."""
    made, order = {kernel.name: kernel for kernel in kernels}, []

    def visit(kernel):
        if kernel not in order:
            for name in sorted(kernel.reads):
                if name in made:
                    visit(made[name])
            order.append(kernel)

    for kernel in sorted(kernels, key=lambda kernel: kernel.min_order):
        visit(kernel)
    return order


def test_kernels_of_many_layers_hold_nothing_up():
    """Rows of layers 0 and 3 are taken together, rows of 1 and 2 too; layer 1 is gathered ahead, and so on."""
    graph = ["gather0", "gather1", "wait0", "product0", "all_rows", "gather2", "wait1", "product1", "rows"]
    graph += ["gather3", "wait2", "product2", "wait3", "product3"]
    reads = {f"wait{i}": (f"gather{i}",) for i in range(4)}
    reads |= {f"product{i}": (f"wait{i}", f"product{i - 1}") for i in range(4)}  # product-1: an argument
    reads |= {"all_rows": ("product0", "product3"), "rows": ("product1", "product2")}
    kernels = [Kernel(name, i, reads.get(name, ())) for i, name in enumerate(graph)]
    before = [kernel.name for kernel in depth_first(kernels)]
    assert before.index("wait2") == before.index("gather2") + 1 and before.index("rows") > before.index("product3")
    after = [kernel.name for kernel in in_graph_order(depth_first(kernels))]
    rest = [name for name in graph if "rows" not in name]
    assert [name for name in after if "rows" not in name] == rest
    assert after.index("rows") == after.index("product2") + 1 and after[-1] == "all_rows"


def test_kernels_that_begin_together_keep_their_order():
    kernels = [Kernel("b", 0), Kernel("a", 0), Kernel("c", 1, ("a", "argument"))]
    assert in_graph_order(kernels) == kernels
