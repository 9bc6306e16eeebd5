"""The definition of selective back-propagation in plain, uncompiled PyTorch.

Nothing of ``cggr_compile`` is imported here. Given the positions that a compiled run selected, a reference run
evaluates the *unmodified* model eagerly, with ``torch.where(hard, x, x.detach())`` placed by hooks, takes its
logits at those positions, and computes the cross-entropy.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import models
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

IGNORE = -100
# modules that project the residual stream to keys and values, in all model families of the zoo
KV_PROJECTIONS = ("k_proj", "v_proj", "c_attn", "query_key_value", "qkv_proj", "kv_a_proj_with_mqa")
# modules that project it to what a token mixer mixes that is no attention
MIXER_PROJECTIONS = ("in_proj", "in_proj_qkvz", "in_proj_ba")
TOLERANCE = 1e-5


class Picks(NamedTuple):
    """What a compiled run selected: positions [B, K], -1 for unused slots, and what the loss of each counts."""

    rows: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Run:
    """A loss and the gradient of every parameter (zeros where autograd left None)."""

    loss: Tensor
    grads: dict[str, Tensor]

    def norm(self) -> float:
        return sum(float(g.double().square().sum()) for g in self.grads.values()) ** 0.5


def hard_mask(selected: Tensor, size: int) -> Tensor:
    """[B, S] mask of the selected positions; -1 marks unused slots."""
    mask = torch.zeros(selected.shape[0], size + 1, dtype=torch.bool)
    mask.scatter_(1, torch.where(selected < 0, size, selected).cpu(), True)
    return mask[:, :size]


def shift(labels: Tensor, ignore_index: int = IGNORE) -> Tensor:
    """Target of the logits at t: the label at t + 1; none for the last position."""
    return F.pad(labels, (0, 1), value=ignore_index)[:, 1:]


def context_rows(
    selected: Tensor, context: int, slots: int, size: int, documents: Tensor | None = None, real: Tensor | None = None
) -> Tensor:
    """bool [B, S]: the ``context`` positions before each selected one, of its document and no padding; with room.

    Args:
        selected: [B, K] positions, -1 for unused slots. slots: of a sequence, for selected positions and context.
        size: S. documents: int [B or 1, S], each position's document. real: bool [B, S], False at padding.
    """
    found = torch.zeros(len(selected), size, dtype=torch.bool)
    for row in range(len(selected)):
        chosen = [i for i in selected[row].tolist() if i >= 0]
        kind = [0] * size if documents is None else documents.expand(len(selected), -1)[row].tolist()
        near = {}
        for position in range(size):
            ahead = [i - position for i in chosen if 0 < i - position <= context and kind[i] == kind[position]]
            if ahead and position not in chosen and (real is None or real[row, position]):
                near[position] = min(ahead)
        for position in sorted(near, key=lambda p: (near[p], p))[: slots - len(chosen)]:
            found[row, position] = True
    return found


def candidates(target: Tensor, ignore_index: int = IGNORE) -> Tensor:
    return target != ignore_index


def difficulty(logits: Tensor, target: Tensor, scoring: str, ignore_index: int = IGNORE) -> Tensor:
    """Difficulty [B, S] of every position, as the options document it."""
    log_p = logits.double().log_softmax(-1)
    top = log_p.exp().topk(2, -1).values
    entropy = -(log_p.exp() * log_p).sum(-1) - top[..., 0]
    margin = 1 - (top[..., 0] - top[..., 1])
    loss = -log_p.gather(-1, torch.where(target == ignore_index, 0, target)[..., None])[..., 0]
    return {"entropy": entropy, "margin": margin, "loss": loss, "combined": entropy + margin + loss}[scoring]


def hardest(scores: Tensor, valid: Tensor, slots: int) -> Tensor:
    """The ``slots`` most difficult candidates of each sequence: ascending, then -1."""
    out = torch.full((scores.shape[0], slots), -1)
    for row in range(scores.shape[0]):
        order = [i for i in scores[row].argsort(descending=True).tolist() if valid[row, i]][:slots]
        out[row, : len(order)] = torch.tensor(sorted(order))
    return out


def selected_loss(
    logits: Tensor,
    target: Tensor,
    picks: Picks | Tensor,
    *,
    valid: Tensor | None = None,
    num_items: float | Tensor | None = None,
    ignore_index: int = IGNORE,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Weighted sum over the selected tokens, divided by the number of candidates or by ``num_items``.

    Positions alone, without weights, all weigh candidates / selected: the mean over the selected tokens, then.
    """
    valid = candidates(target, ignore_index=ignore_index) if valid is None else valid
    rows = picks.rows if isinstance(picks, Picks) else picks
    batch, slot = torch.where(rows >= 0)
    where = rows[batch, slot]
    wanted = target[batch, where]
    assert not (wanted == ignore_index).any(), "a position without a target was selected"
    if len(wanted) == 0:
        return logits.sum() * 0.0
    weights = picks.weights[batch, slot] if isinstance(picks, Picks) else valid.sum() / len(wanted)
    nll = F.cross_entropy(logits[batch, where].float(), wanted, reduction="none", label_smoothing=label_smoothing)
    return (nll * weights).sum() / (valid.sum() if num_items is None else num_items)


class _StopAtAttention(TorchFunctionMode):
    """Every scaled_dot_product_attention sees keys and values that carry no gradient on unselected rows."""

    def __init__(self, stop: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stop = stop

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value")
            kwargs.update(zip(names, args, strict=False))
            query, key, value = (kwargs.pop(name) for name in names)
            args = (query, self.stop(key), self.stop(value), *args[3:])
        return func(*args, **kwargs)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


def _named(model: Any, names: tuple[str, ...]) -> list[nn.Module]:
    pairs = model.named_modules() if isinstance(model, nn.Module) else ()
    return [module for path, module in pairs if path.rsplit(".", 1)[-1] in names]


@contextlib.contextmanager
def routing(model: Any, hard: Tensor, gradient: str, kv_gradient: str, factors: Tensor | None = None) -> Iterator[None]:
    """Stops gradient on unselected rows of whatever ``model`` attends to, while the context is open.

    ``factors`` [B, S]: what the gradient of the others is multiplied with there.
    """

    def weighed(x: Tensor, shape: tuple[int, ...]) -> Tensor:
        return x if factors is None else x.detach() + (x - x.detach()) * factors.to(x.dtype).view(shape)

    batch, size = hard.shape
    with contextlib.ExitStack() as stack:
        if gradient == "exact":
            pass
        elif kv_gradient == "stop":

            def stop(x: Tensor) -> Tensor:  # [B, heads, S, D]
                return torch.where(hard[:, None, :, None], weighed(x, (batch, 1, size, 1)), x.detach())

            def stop_rows(x: Tensor) -> Tensor:  # [B, S, H]
                return torch.where(hard[:, :, None], weighed(x, (batch, size, 1)), x.detach())

            for module in _named(model, MIXER_PROJECTIONS):
                stack.callback(module.register_forward_hook(lambda m, args, out: stop_rows(out)).remove)
            stack.enter_context(_StopAtAttention(stop))
            stack.enter_context(_replaced(models, "keys_values", lambda k, v: (stop(k), stop(v))))
            modules = {type(m).__module__ for m in model.modules()} if isinstance(model, nn.Module) else set()
            for name in modules & set(sys.modules):
                inner = getattr(sys.modules[name], "eager_attention_forward", None)
                if inner is not None:

                    def eager(
                        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, _f: Any = inner, **kw: Any
                    ):
                        return _f(module, q, stop(k), stop(v), *args, **kw)

                    stack.enter_context(_replaced(sys.modules[name], "eager_attention_forward", eager))
        else:

            def gate(x: Tensor) -> Tensor:  # [B, S, H]
                return torch.where(hard[:, :, None], weighed(x, (batch, size, 1)), x.detach())

            stack.enter_context(_replaced(models, "kv_input", gate))
            found = 0
            for module in _named(model, (*KV_PROJECTIONS, *MIXER_PROJECTIONS)):
                handle = module.register_forward_pre_hook(lambda _, args: (gate(args[0]), *args[1:]))
                stack.callback(handle.remove)
                found += 1
            assert found or not hasattr(model, "config"), "the reference found no key/value projection to gate"
        yield


def named_leaves(model: Any) -> dict[str, Tensor]:
    pairs = model.named_parameters() if isinstance(model, nn.Module) else model.params.items()
    return {name: p for name, p in pairs if p.requires_grad}


def collect(model: Any, loss: Tensor) -> Run:
    """Copies of the loss and the gradients present; clears the gradients."""
    grads = {}
    for name, p in named_leaves(model).items():
        grads[name] = torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
        p.grad = None
    return Run(loss.detach().clone(), grads)


def backward(model: Any, loss: Tensor) -> Run:
    loss.backward()
    return collect(model, loss)


def reference(
    model: Any,
    logits: Callable[[], Tensor],
    target: Tensor,
    picks: Picks | Tensor,
    *,
    gradient: str = "routed",
    kv_gradient: str = "project",
    kv_weight: str = "1",
    extra: Tensor | None = None,
    context: Tensor | None = None,
    **loss: Any,
) -> Run:
    """The run that a compiled model has to reproduce: ``logits`` evaluates the unmodified model eagerly.

    ``extra``: bool [B, S], positions that carry gradient whether they are selected or not; ``context``: likewise, the
    positions that carry gradient because of those that are selected.
    """
    rows = picks.rows if isinstance(picks, Picks) else picks
    factors = None
    if kv_weight == "1/sqrt(p)":
        assert isinstance(picks, Picks)
        factors = torch.zeros(*target.shape).index_put_(
            (torch.arange(len(rows))[:, None].expand_as(rows)[rows >= 0], rows[rows >= 0]),
            picks.weights[rows >= 0].sqrt(),
        )
        factors = factors if extra is None else torch.where(extra, 1.0, factors)
    hard = hard_mask(rows, target.shape[1]).to(target.device)
    if context is not None:
        factors = None if factors is None else torch.where(context & ~hard, 1.0, factors)
        hard = hard | context
    with routing(model, hard if extra is None else hard | extra, gradient, kv_gradient, factors):
        return backward(model, selected_loss(logits(), target, picks, **loss))


def hf_reference(model: nn.Module, batch: Mapping[str, Any], picks: Picks | Tensor, **kwargs: Any) -> Run:
    """``reference`` of a transformers model called as ``model(**batch)``, never through its compiled forward."""
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "num_items_in_batch")}
    target = shift(batch["labels"])
    num_items = batch.get("num_items_in_batch")
    logits = lambda: eager_call(model, use_cache=False, **inputs).logits  # noqa: E731
    return reference(model, logits, target, picks, num_items=num_items, **kwargs)


def dense(model: nn.Module, batch: Mapping[str, Any]) -> Run:
    """Loss and gradients of the unmodified, uncompiled model."""
    return backward(model, eager_call(model, **batch).loss)


def eager_call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``model(...)`` without its compiled forward, also when ``model.compile`` was called on it."""
    return model._call_impl(*args, **kwargs)


def errors(run: Run, ref: Run) -> dict[str, float]:
    """Relative error of the loss and of each gradient.

    Gradients that are zero but for rounding (the bias of a key projection, say) are measured against a
    thousandth of the whole gradient's norm.
    """
    assert run.grads.keys() == ref.grads.keys()
    floor = 1e-3 * ref.norm() + 1e-30
    out = {
        "loss": float((run.loss - ref.loss).abs() / ref.loss.abs().clamp_min(1e-30)) if ref.loss != run.loss else 0.0
    }
    for name, want in ref.grads.items():
        gap = (run.grads[name].double() - want.double()).norm()
        out[name] = float(gap / max(float(want.double().norm()), floor))
        assert torch.isfinite(run.grads[name]).all(), f"{name} has a gradient that is not finite"
    return out


def worst(run: Run, ref: Run) -> tuple[float, str]:
    return max((value, name) for name, value in errors(run, ref).items())


def overall(run: Run, ref: Run) -> float:
    """Relative error of the whole gradient as one vector."""
    gap = sum(float((run.grads[n].double() - g.double()).square().sum()) for n, g in ref.grads.items())
    return gap**0.5 / ref.norm()


def assert_same(run: Run, ref: Run, tolerance: float = TOLERANCE) -> None:
    bad = {name: f"{e:.2e}" for name, e in errors(run, ref).items() if not e <= tolerance}
    assert not bad, f"{len(bad)} of {len(ref.grads) + 1} differ by more than {tolerance}: {dict(list(bad.items())[:8])}"


def assert_zero(run: Run) -> None:
    assert run.loss == 0, run.loss
    bad = [name for name, g in run.grads.items() if not (g == 0).all()]
    assert not bad, bad
