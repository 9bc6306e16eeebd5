"""Parameters spread over processes in a way that leaves a training step one graph.

``fully_shard`` gathers and frees parameters in hooks, which cut a graph at every module that it is called for. Here a
parameter is a ``DTensor``, and to read it is to gather it: a class property of the module that owns it redistributes
it. So gathering is part of what Dynamo captures, and reducing the gradient part of what autograd derives from that. A
compiler may move both (SimpleFSDP, arXiv 2411.00284).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.nn import Module, Parameter
from torch.nn.parallel import DistributedDataParallel

from cggr_compile import compat
from cggr_compile.sharding import RECORD, Sharding, sharding_of

__all__ = ["as_stored", "shard"]

_stored = False


@contextmanager
def as_stored() -> Iterator[None]:
    """A context in which a module's parameters are what it stores, ``DTensor`` shards, and are not gathered.

    For what writes to them, as an initialisation does::

        with as_stored():
            model.init_weights()
    """
    global _stored
    before, _stored = _stored, True
    try:
        yield
    finally:
        _stored = before


def shard(
    model: Module,
    mesh: DeviceMesh,
    *,
    reshard_after_forward: bool = True,
    mp_policy: MixedPrecisionPolicy | None = None,
) -> Module:
    """Spread the parameters of ``model`` over the processes of ``mesh``, in place.

    Each process keeps its part of every parameter's first axis, as a ``DTensor``. Gradients are such parts too, of the
    mean over all processes. Optimizers, clipping and ``torch.distributed.checkpoint`` take them as they are, the names
    in the ``state_dict`` stay. Every process runs the same steps, as under ``fully_shard``. To be called before the
    optimizer is made and before the first step. The values are those of the mesh's first process; on the meta device
    there are none yet: give them with ``model.to_empty(device=...)``, then a checkpoint or, under :func:`as_stored`, an
    initialisation.

    Args:
        model: a module whose parameters are whole on every process, or on the meta device.
        mesh: of one axis; or of two, where the parameters are copied along the first and sharded along the second.
        reshard_after_forward: whether the full parameters are freed behind the forward pass, and gathered once more by
            the backward pass. Otherwise they are kept. ``backend="cggr"`` does it; without it they are always kept.
        mp_policy: ``param_dtype`` is what parameters are gathered and used in, ``reduce_dtype`` what gradients are
            reduced in (by default in ``param_dtype``). Gradients have the stored parameter's dtype. Inputs are not
            cast.

    Returns:
        ``model``. The modules with parameters have classes of their own, which derive from what they were.

    Raises:
        ValueError: an argument is none of these; a parameter is spread already; or a module keeps its parameters
            elsewhere, too (``torch.nn.LSTM``).
    """
    sharding = _checked(model, mesh, reshard_after_forward, mp_policy)
    spread: dict[Parameter, Parameter] = {}  # a parameter may be in several places
    classes: dict[tuple[type, tuple[str, ...]], type] = {}
    for part in list(model.modules()):
        parameters, buffers = compat.own_parameters(part), compat.own_buffers(part)
        names = tuple(name for name, parameter in parameters.items() if parameter is not None)
        for name in names:
            full = parameters[name]
            assert full is not None
            if full not in spread:
                local = distribute_tensor(full.detach(), mesh, _placements(full, mesh))
                spread[full] = Parameter(local, requires_grad=full.requires_grad)
            parameters[name] = spread[full]
        for name, buffer in buffers.items():
            if buffer is not None and not buffer.is_meta:
                buffers[name] = buffer.to(mesh.device_type)
        if names:
            kind = type(part)
            if (kind, names) not in classes:
                classes[kind, names] = _sharded_class(kind, names, sharding)
            part.__class__ = classes[kind, names]
    return model


def _checked(model: Any, mesh: Any, reshard_after_forward: Any, mp_policy: Any) -> Sharding:
    if not isinstance(mesh, DeviceMesh) or mesh.ndim not in (1, 2):
        raise ValueError(f"mesh must be a DeviceMesh of one axis, or of two (copies, shards), got {mesh!r}")
    if not isinstance(reshard_after_forward, bool):
        raise ValueError(f"reshard_after_forward must be True or False, got {reshard_after_forward!r}")
    policy = MixedPrecisionPolicy() if mp_policy is None else mp_policy
    if not isinstance(policy, MixedPrecisionPolicy) or policy.output_dtype is not None:
        raise ValueError(f"mp_policy must be a MixedPrecisionPolicy without output_dtype, got {mp_policy!r}")
    if not isinstance(model, Module) or isinstance(model, DistributedDataParallel):
        kind = type(model).__name__
        raise ValueError(f"model must be a Module that is not wrapped in DistributedDataParallel, got a {kind}")
    if sharding_of(model) is not None:
        raise ValueError("model must not be sharded yet: shard() was called for it or for a part of it")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"model must have plain parameters, but {name} is a DTensor already (fully_shard, tensor or context "
                "parallelism), which shard() does not go together with"
            )
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.RNNBase):
            raise ValueError(f"model must not hold recurrent layers, which keep their weights a second time: {name}")
    return Sharding(mesh, reshard_after_forward, policy.param_dtype, policy.reduce_dtype or policy.param_dtype)


def _placements(parameter: Tensor, mesh: DeviceMesh) -> list[Placement]:
    """A number is copied, as it has no axis to be cut along; so is everything where one process has all of it."""
    last = Shard(0) if parameter.dim() and mesh.size(mesh.ndim - 1) > 1 else Replicate()
    return [*[Replicate()] * (mesh.ndim - 1), last]


def _sharded_class(kind: type, names: tuple[str, ...], sharding: Sharding) -> type:
    members: dict[str, Any] = {name: property(_reader(name, sharding)) for name in names}
    return type(f"Sharded{kind.__name__}", (kind,), {**members, RECORD: sharding, "__module__": kind.__module__})


def _reader(name: str, sharding: Sharding) -> Any:
    mesh, param_dtype, reduce_dtype = sharding.mesh, sharding.param_dtype, sharding.reduce_dtype
    everywhere = [Replicate()] * mesh.ndim
    # every process has the gradient of its own batch's loss: the mean is what the loss of all batches has
    of_each = [Partial("avg") if mesh.size(axis) > 1 else Replicate() for axis in range(mesh.ndim)]

    def read(module: Module) -> Tensor | None:
        stored: Any = compat.own_parameters(module)[name]
        if _stored or stored is None:
            return stored  # type: ignore[no-any-return]
        floating = stored.is_floating_point()
        gathered = stored.redistribute(
            placements=everywhere,
            forward_dtype=param_dtype if floating else None,
            backward_dtype=reduce_dtype if floating else None,
        )
        full: Tensor = gathered.to_local(grad_placements=of_each)
        return full

    return read
