"""Layouts of views: what a tensor with a row per position has, by index arithmetic, against the views themselves."""

from __future__ import annotations

import random

import pytest
import torch

from cggr_compile.passes.patterns.token_values.layout import (
    BATCH,
    FEATURE,
    FLAT,
    TOKEN,
    Layout,
    Window,
    cut,
    joined,
    permuted,
    picked,
    reshaped,
    stacked,
)

B, S, V = 3, 8, 5
LOGITS = Layout((BATCH, TOKEN, FEATURE), Window(0, B, 0, S), (V,), (True,))


def positions(layout: Layout, shape: tuple[int, ...]) -> torch.Tensor:
    """The number of the sequence and position that every entry of a tensor belongs to, 100 * sequence + position."""
    window = layout.window
    whole = 100 * torch.arange(window.first, window.first + window.count)[:, None]
    whole = whole + torch.arange(window.start, window.start + window.length)
    if FLAT in layout.axes:
        whole = whole.flatten()[window.begin : window.begin + window.size]
    kinds = [kind for kind in layout.axes if kind != FEATURE]
    assert len(kinds) == whole.dim()
    sizes = iter(whole.shape)
    return whole.reshape([1 if kind == FEATURE else next(sizes) for kind in layout.axes]).expand(shape)


MARKED = (100 * torch.arange(B)[:, None] + torch.arange(S))[:, :, None].expand(B, S, V)
VIEWS = {
    "flat": (lambda x: x.reshape(-1, V), lambda a: reshaped(a, (B, S, V), (B * S, V))),
    "features split": (lambda x: x.reshape(B, S, 1, V), lambda a: reshaped(a, (B, S, V), (B, S, 1, V))),
    "flat and back": (
        lambda x: x.reshape(-1, V).reshape(B, S, V),
        lambda a: reshaped(reshaped(a, (B, S, V), (B * S, V)), (B * S, V), (B, S, V)),
    ),
    "classes in the middle": (lambda x: x.transpose(1, 2), lambda a: permuted(a, [0, 2, 1])[0]),
    "a slice": (lambda x: x[:, 2:7], lambda a: cut(a, 1, 2, 5)),
    "sequences": (lambda x: x[1:], lambda a: cut(a, 0, 1, 2)),
    "one sequence": (lambda x: x[2], lambda a: picked(a, 0, 2)),
    "one position": (lambda x: x[:, 6], lambda a: picked(a, 1, 6)),
    "a part of one": (lambda x: x[1, 3:6], lambda a: cut(picked(a, 0, 1), 0, 3, 3)),
    "a piece across sequences": (
        lambda x: x.reshape(-1, V)[5:11],
        lambda a: cut(reshaped(a, (B, S, V), (B * S, V)), 0, 5, 6),
    ),
    "one sequence as a batch": (lambda x: x[1:2, 2:].reshape(6, V), lambda a: reshaped(
        cut(cut(a, 0, 1, 1), 1, 2, 6), (1, 6, V), (6, V)
    )),
    "pieces joined": (
        lambda x: torch.cat([x[:, :3], x[:, 3:7]], 1),
        lambda a: joined([cut(a, 1, 0, 3), cut(a, 1, 3, 4)], 1),
    ),
    "sequences stacked": (lambda x: torch.stack([x[1], x[2]]), lambda a: stacked([picked(a, 0, 1), picked(a, 0, 2)])),
}  # fmt: skip


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_has_the_positions_of_its_layout(name):
    view, plan = VIEWS[name]
    value, layout = view(MARKED), plan(LOGITS)
    assert torch.equal(positions(layout, tuple(value.shape)), value)
    assert torch.Size(size for kind, size in zip(layout.axes, value.shape, strict=True) if kind == FEATURE) == (
        layout.features
    )
    assert layout.has_classes


@pytest.mark.parametrize(
    "found",
    [
        lambda: reshaped(LOGITS, (B, S, V), (B, S * V)),  # positions and classes
        lambda: reshaped(LOGITS, (B, S, V), (S, B, V)),
        lambda: reshaped(permuted(LOGITS, [0, 2, 1])[0], (B, V, S), (B * V, S)),
        lambda: permuted(LOGITS, [1, 0, 2]),
        lambda: reshaped(cut(reshaped(LOGITS, (B, S, V), (B * S, V)), 0, 2, S), (S, V), (2, S // 2, V)),
        lambda: joined([cut(LOGITS, 1, 0, 3), cut(LOGITS, 1, 4, 4)], 1),  # a gap
        lambda: joined([cut(LOGITS, 1, 3, 3), cut(LOGITS, 1, 0, 3)], 1),
        lambda: stacked([picked(LOGITS, 0, 2), picked(LOGITS, 0, 1)]),
        lambda: stacked([picked(LOGITS, 0, 0), picked(LOGITS, 0, 2)]),
    ],
)
def test_what_mixes_positions_has_none(found):
    assert found() is None


def factored(number: int, rng: random.Random) -> tuple[int, ...]:
    """A shape of so many entries."""
    shape = []
    while number > 1 or rng.random() < 0.3:
        size = rng.choice([d for d in range(1, number + 1) if number % d == 0])
        shape.append(size)
        number //= size
    return tuple(shape)


def step(value: torch.Tensor, layout: Layout, rng: random.Random) -> tuple[torch.Tensor, Layout | None]:
    """Some view of a value, and its layout."""
    kind, axis = rng.choice(["reshape", "merge", "permute", "cut", "pick"]), rng.randrange(value.dim())
    if kind == "reshape":
        shape = factored(value.numel(), rng)
        return value.reshape(shape), reshaped(layout, tuple(value.shape), shape)
    if kind == "merge":
        end = rng.randrange(axis, value.dim()) + 1
        shape = (*value.shape[:axis], *rng.choice([(), (1,)]), value.shape[axis:end].numel(), *value.shape[end:])
        return value.reshape(shape), reshaped(layout, tuple(value.shape), shape)
    if kind == "permute":
        order = rng.sample(range(value.dim()), value.dim())
        found = permuted(layout, order)
        return value.permute(order), found and found[0]
    size = value.shape[axis]
    begin = rng.randrange(size)
    if kind == "cut":
        count = rng.randrange(size - begin) + 1
        return value.narrow(axis, begin, count), cut(layout, axis, begin, count)
    return value.select(axis, begin), picked(layout, axis, begin)


@pytest.mark.parametrize("seed", range(4))
def test_any_views(seed):
    """Sizes that coincide, and axes of size 1, included: whatever has a layout has that one."""
    rng, known = random.Random(seed), 0
    for _ in range(400):
        sizes = [rng.choice([1, 2, 2, 3, 4]) for _ in range(3)]
        batch, length, classes = sizes
        value = (100 * torch.arange(batch)[:, None] + torch.arange(length))[:, :, None].expand(sizes)
        layout: Layout | None = Layout((BATCH, TOKEN, FEATURE), Window(0, batch, 0, length), (classes,), (True,))
        for _ in range(rng.randrange(1, 6)):
            if not value.dim():
                break
            value, layout = step(value, layout, rng)
            if layout is None:
                break
            known += 1
            assert torch.equal(positions(layout, tuple(value.shape)), value), (sizes, layout)
    assert known > 400
