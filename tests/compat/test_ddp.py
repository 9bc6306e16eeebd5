"""Names of the optimizer that cuts graphs for DistributedDataParallel (see semantics/test_data_parallel.py)."""

from __future__ import annotations

import inspect

from cggr_compile import compat


def test_names_of_the_optimizer():
    from torch._dynamo import exc, output_graph
    from torch._dynamo.backends import distributed

    optimizer = distributed.DDPOptimizer(bucket_bytes_cap=8, backend_compile_fn=print, first_bucket_cap=4)
    assert (optimizer.bucket_bytes_cap, optimizer.first_bucket_cap) == (8, 4)
    assert list(inspect.signature(optimizer.compile_fn).parameters)[:2] == ["gm", "example_inputs"]
    assert callable(distributed.SubmodCompiler.compile_submod)
    assert issubclass(exc.TensorifyScalarRestartAnalysis, exc.RestartAnalysis)
    assert "TensorifyScalarRestartAnalysis" in inspect.getsource(output_graph.OutputGraph._call_user_compiler)


def test_names_of_the_processes():
    from torch.nn.parallel import DistributedDataParallel

    assert DistributedDataParallel._active_ddp_module is None
    source = inspect.getsource(DistributedDataParallel)
    assert "_active_ddp_module = self" in source and "self._join_config.enable" in source


def test_outside_of_it():
    assert compat.ddp_cut() is None and compat.ddp_group() is None
