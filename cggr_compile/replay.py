"""A training step as two CUDA graphs, its forward and its backward, recorded once and replayed.

Inductor's own CUDA graphs follow every tensor that the forward keeps for the backward, hundreds of them, and the
parameters besides, in Python: some 1.5 ms of a step, where a small model's kernels take 5. Here what is kept stays
inside the recording, and the host is left with two launches and the parameters' gradients.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from cggr_compile import compat


class Pool:
    """Memory that the recordings of a device share: only one may be between its forward and its backward.

    It lasts as long as there are recordings: CUDA gives the memory back with the last graph, and the handle with it.
    """

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()
        self._written: set[int] = set()  # addresses of the gradients that replays write
        self._holders: dict[int, weakref.ref[Tensor]] = {}  # parameters whose .grad may be one of these
        self._last: Callable[[], Any] = lambda: None  # the autograd node of the last forward, if it is still alive

    @property
    def busy(self) -> bool:
        """Whether the last forward may still be differentiated."""
        node = self._last()
        return node is not None and not node.done

    def begin(self, node: Any) -> None:
        node.done = False
        self._last = weakref.ref(node)

    def writes(self, gradients: Iterable[Tensor | None]) -> None:
        self._written.update(grad.data_ptr() for grad in gradients if grad is not None)

    def handed_to(self, parameters: Iterable[Tensor]) -> None:
        """Their ``.grad`` will be what a replay wrote."""
        self._holders.update((id(parameter), weakref.ref(parameter)) for parameter in parameters)

    def keep_gradients(self) -> None:
        """Before a replay: copy the gradients of earlier ones that are still there, to be added to, out of its way."""
        for key, reference in list(self._holders.items()):
            parameter = reference()
            if parameter is None:
                del self._holders[key]
            elif (grad := parameter.grad) is not None and grad.data_ptr() in self._written:
                parameter.grad = grad.clone()


_POOLS: weakref.WeakValueDictionary[torch.device, Pool] = weakref.WeakValueDictionary()


def pool_of(device: torch.device) -> Pool:
    """The pool of the recordings there are, or a new one."""
    pool = _POOLS.get(device)
    if pool is None:
        pool = _POOLS[device] = Pool()
    return pool


def captured(function: Callable[[], Any], pool: Pool, stream: Any) -> tuple[Callable[[], None], Any]:
    """What runs the kernels of ``function`` again, and its result, which each such run overwrites."""
    graph = torch.cuda.CUDAGraph()
    try:
        # thread_local: a data loader that pins memory meanwhile is no error
        record = torch.cuda.graph(graph, pool=pool.handle, stream=stream, capture_error_mode="thread_local")
        with compat.own_cublas_workspace(), record:
            result = function()
    except RuntimeError:
        # a recording that breaks off leaves the random generators in its state; one that does not takes them out of it
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            torch.zeros(1, device=stream.device)
        raise
    return graph.replay, result


class Recording:
    """One compiled step at the parameters that it was recorded with.

    Args:
        function: of tensors, parameters among them, to a sequence of results. It must write into none of them, and
            have run before, backward included: kernels are compiled and tuned at their first launch.
        parameters: which arguments keep their place in memory from call to call; the others are copied.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Any]],
        args: Sequence[Any],
        parameters: Sequence[int],
        device: torch.device,
    ) -> None:
        self.pool = pool_of(device)
        tensors = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
        self._parameters = list(parameters)
        self._addresses = [arg.data_ptr() if isinstance(arg, Tensor) else 0 for arg in args]
        self._copied = [i for i in tensors if i not in self._parameters]
        self._leaves = [i for i in tensors if args[i].requires_grad]
        self._constants = {i: arg for i, arg in enumerate(args) if not isinstance(arg, Tensor)}
        self._known: Callable[[], Any] = lambda: None  # of the leaves that the pool knows the first, if it is alive
        inputs = list(args)
        for i in tensors:  # leaves of their own, without the hooks of the model's
            own = args[i].detach() if i in self._parameters else args[i].detach().clone()
            inputs[i] = own.requires_grad_(args[i].requires_grad)
        self._buffers = [inputs[i].detach() for i in self._copied]
        leaves = [inputs[i] for i in self._leaves]

        def forward() -> tuple[list[Any], list[int]]:
            outputs = list(function(*inputs))
            return outputs, [i for i, out in enumerate(outputs) if isinstance(out, Tensor) and out.requires_grad]

        def backward(roots: list[Tensor], start: list[Tensor]) -> list[Tensor | None]:
            return list(torch.autograd.grad(roots, leaves, start, allow_unused=True))

        stream, here = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(here)
        try:
            # a recording that breaks off leaves its stream the current one: this takes that back
            with torch.cuda.stream(here), torch.random.fork_rng([device]), torch.enable_grad():
                with torch.cuda.stream(stream):  # libraries set up what they need at their first call
                    outputs, self._roots = forward()
                    roots = [outputs[i] for i in self._roots]
                    backward(roots, [torch.ones_like(root) for root in roots])
                    del outputs, roots
                self._forward, (outputs, _) = captured(forward, self.pool, stream)
                roots = [outputs[i] for i in self._roots]
                self.tangents = [torch.empty_like(root) for root in roots]
                self.backward, self.gradients = captured(lambda: backward(roots, self.tangents), self.pool, stream)
        finally:
            here.wait_stream(stream)
        self.pool.writes(self.gradients)
        self._outputs = [out.detach() if isinstance(out, Tensor) else out for out in outputs]

    def same_parameters(self, args: Sequence[Any]) -> bool:
        return compat.same_addresses(args, self._addresses, self._parameters)

    def fits(self, args: Sequence[Any]) -> bool:
        """Whether a replay computes what a call with these arguments would."""
        shapes = all(args[i].shape == own.shape for i, own in zip(self._copied, self._buffers, strict=True))
        return shapes and all(args[i] == value for i, value in self._constants.items())

    def run(self, args: Sequence[Any]) -> list[Any]:
        """The results of a call: copies of those that carry gradient; the next run overwrites the others."""
        leaves = [args[i] for i in self._leaves]
        if leaves[0] is not self._known():
            self._known = weakref.ref(leaves[0])
            self.pool.handed_to(leaf for leaf in leaves if leaf.is_leaf)
        self.pool.keep_gradients()
        if self._copied:
            torch._foreach_copy_(self._buffers, [args[i].detach() for i in self._copied])
        results = [out.detach() if isinstance(out, Tensor) else out for out in self._outputs]
        for i, out in zip(self._roots, compat.apply_function(_Step, self, *leaves), strict=True):
            results[i] = out
        return results

    def forward(self) -> tuple[Tensor, ...]:
        self._forward()
        return tuple(self._outputs[i].clone() for i in self._roots)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recording: Recording, *_leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.recording = recording
        ctx.set_materialize_grads(False)
        recording.pool.begin(ctx)
        return recording.forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if ctx.done:
            raise RuntimeError(
                "with CUDA graphs a loss is differentiated once: what its forward kept is gone "
                "(retain_graph=True needs options={'cuda_graphs': False})"
            )
        ctx.done = True
        recording: Recording = ctx.recording
        for tangent, grad in zip(recording.tangents, grads, strict=True):
            tangent.zero_() if grad is None else tangent.copy_(grad)
        recording.backward()
        # a new tensor each time: autograd takes it over as the parameter's gradient, without a copy
        return None, *(None if grad is None else grad.detach() for grad in recording.gradients)


class Replay:
    """``function``, recorded at its second call for a model and replayed from then on.

    What cannot be replayed runs as it is: the first call, other sizes, a forward under saved-tensors hooks (in
    ``torch.utils.checkpoint``), and one while the one before it still waits for its backward.

    Args:
        function, parameters: see :class:`Recording`.
        model: gives an object for each model that calls; recordings are kept as long as these.
        notify: told why something is not replayed; it may be told again and again.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        parameters: Sequence[int],
        device: torch.device,
        model: Callable[[], Any],
        notify: Callable[[str], None],
    ) -> None:
        self._function, self._parameters, self._device = function, parameters, device
        self._model, self._notify = model, notify
        self._recordings: weakref.WeakKeyDictionary[Any, Recording | None] = weakref.WeakKeyDictionary()
        self._obstacle = ""

    def __call__(self, *args: Any) -> Any:
        # a replay hands nothing to saved-tensors hooks: a checkpoint, for one, could not recompute it
        as_it_is = self._obstacle or torch.cuda.is_current_stream_capturing() or compat.under_saved_tensors_hooks()
        recording = None if as_it_is else self._recording(args)
        if recording is None or not recording.fits(args):
            return self._function(*args)
        if recording.pool.busy:
            self._notify("a forward before the last one's backward runs without CUDA graphs")
            return self._function(*args)
        return recording.run(args)

    def _recording(self, args: Sequence[Any]) -> Recording | None:
        model = self._model()
        recording = self._recordings.get(model)
        if recording is not None and recording.same_parameters(args):
            return recording
        first = model not in self._recordings
        self._recordings[model] = None  # the memory of one for other parameters is free
        if first:
            return None
        self._obstacle = self._unfit_among(args)
        if not self._obstacle:
            try:
                recording = self._recordings[model] = Recording(self._function, args, self._parameters, self._device)
                return recording
            except RuntimeError as error:
                self._obstacle = f"recording failed: {error}"
        self._notify(f"CUDA graphs are not used: {self._obstacle}")
        return None

    def _unfit_among(self, args: Sequence[Any]) -> str:
        """The argument that rules a recording out, in words; empty if there is none."""
        for arg in args:
            if isinstance(arg, Tensor) and arg.device != self._device:
                return f"an input is on {arg.device}, the loss on {self._device}"
            if isinstance(arg, Tensor) and type(arg) not in (Tensor, Parameter):
                return f"an input is a {type(arg).__name__}"
        return ""
