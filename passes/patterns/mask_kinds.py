"""What an attention mask is, found by computing it for several sizes and padding patterns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from cggr_compile.passes.analysis.effects import memory, mutated_operands, overlap
from cggr_compile.passes.facts import Attention
from cggr_compile.passes.nodes import argument, fake_value, same_size, shape_of
from cggr_compile.passes.patterns.mask_program import MaskProgram, Sizes, TooLarge, Undecided, concrete

# An additive mask entry at or below this blocks: exp(-65000 + any sane score difference) is 0 (fp16's -inf is -65504).
BLOCKED = -65000.0
# Longest sequence tried for a symbolic length.
LENGTH_LIMIT = 1 << 15
# Mask entries from which on fewer padding patterns are tried.
_MANY = 1 << 28
# Elements compared at a time.
_CHUNK = 1 << 24


@dataclass(frozen=True)
class MaskKind:
    """What one mask computes.

    Attributes:
        name: ``causal``, ``sliding_window(w)``, either with ``_and_padding``, ``data`` or ``unknown``.
        causal: exactly causal (for a batch without padding, if it has a padding input) at every size.
        padding: the graph input [B, S] whose zeros are masked as keys.
        binary: the rule holds only for values 0 and 1 of that input.
        reason: why nothing better could be said.
    """

    name: str
    causal: bool = False
    padding: Node | None = None
    binary: bool = False
    reason: str = ""


def classify(mask: Node, attentions: Sequence[Attention]) -> MaskKind:
    """What ``mask``, shared by these attentions, computes. Leaves the graph and its symbolic sizes alone."""
    try:
        program = MaskProgram.of(mask, [attention.node for attention in attentions])
        queries = _queries(attentions)
        padding = _padding_input(program, queries)
        samples, untried = _sample_sizes(program, queries, padding)
        try:
            return _probe([(program, sizes) for sizes in samples], untried, queries, padding)
        except TooLarge:
            if not isinstance(queries[-1], int):
                raise
            return _probe(*_shorter(program, queries[-1], samples[0]), queries, padding)
    except Undecided as undecided:
        return MaskKind(undecided.kind, reason=str(undecided))


def _queries(attentions: Sequence[Attention]) -> tuple[Any, ...]:
    """Sizes [B, ..., S] of the queries that share a mask; as many keys as queries everywhere."""
    found: list[tuple[Any, ...]] = []
    for attention in attentions:
        if attention.kind == "sdpa":
            query, key = shape_of(argument(attention.node, 0, "query")), shape_of(argument(attention.node, 1, "key"))
            sizes, keys = query[:-1], key[-2]
        else:
            scores = shape_of(attention.node)
            sizes, keys = scores[:-1], scores[-1]
        if not same_size(sizes[-1], keys):
            raise Undecided("there are not as many keys as queries")
        found.append(sizes)
    if any(len(other) != len(found[0]) or not same_size(other[-1], found[0][-1]) for other in found):
        raise Undecided("attentions of different lengths share it")
    return found[0]


def _padding_input(program: MaskProgram, queries: tuple[Any, ...]) -> Node | None:
    """The one graph input that the mask depends on, if it may be an attention mask [B, S]."""
    if not program.inputs:
        return None
    node = program.inputs[0]
    value = fake_value(node)
    plausible = (
        len(program.inputs) == 1
        and len(queries) >= 3
        and node.op == "placeholder"
        and isinstance(value, Tensor)
        and not isinstance(value, torch.nn.Parameter)
        and not value.requires_grad
        and not value.is_complex()
        and value.dim() == 2
        and same_size(value.shape[0], queries[0])
        and same_size(value.shape[1], queries[-1])
    )
    if not plausible:
        raise Undecided(f"it depends on {', '.join(n.name for n in program.inputs)}", "data")
    written = (memory(operand) for n in node.graph.nodes for operand in mutated_operands(n))
    if any(overlap(operand, memory(node)) for operand in written):
        raise Undecided(f"it depends on {node.name}, which the graph writes to", "data")
    return node


def _probe(
    samples: Sequence[tuple[MaskProgram, Sizes]], untried: str, queries: tuple[Any, ...], padding: Node | None
) -> MaskKind:
    """Compute the mask at every sample of the sizes and look at it; ``untried``: what the samples leave open."""
    binary = False
    for program, sizes in samples:
        length = int(program.fit(concrete(queries[-1], sizes)))
        if padding is None:
            base = program.run(sizes, {})
        else:
            like = fake_value(padding)
            ones = torch.ones(program.fit(concrete(like.shape, sizes)), dtype=like.dtype)
            base = program.run(sizes, {padding: ones})
            binary = binary or not _follows(program, sizes, padding, base, len(queries), binary=False)
            if binary and not _follows(program, sizes, padding, base, len(queries), binary=True):
                raise Undecided(f"it depends on {padding.name}, and not as on a padding mask", "data")
        width = band_width(base, length)
        if width != length:
            break
    suffix = "" if padding is None else "_and_padding"
    if width is None:
        reason = "it is neither causal nor a causal sliding window"
        return MaskKind("unknown" + suffix, padding=padding, binary=binary, reason=reason)
    if width != length:
        reason = f"it lets a query attend to {width} keys only, and there are {length}"
        return MaskKind(f"sliding_window({width}){suffix}", padding=padding, binary=binary, reason=reason)
    return MaskKind("causal" + suffix, not untried, padding, binary, untried)


def _follows(program: MaskProgram, sizes: Sizes, padding: Node, base: Tensor, rank: int, binary: bool) -> bool:
    """Whether zeros of the padding input, and nothing else about it, hide keys."""
    like = fake_value(padding)
    base = base[(None,) * (rank + 1 - base.dim())]
    for pattern in _patterns(program.fit(concrete(like.shape, sizes)), like.dtype, binary):
        mask = program.run(sizes, {padding: pattern})
        if not follows_padding(mask[(None,) * (rank + 1 - mask.dim())], base, pattern != 0, exact=binary):
            return False
    return True


def _patterns(shape: tuple[int, int], dtype: torch.dtype, binary: bool) -> Iterator[Tensor]:
    """Padding inputs to try: [B, S], zero at padding, nonzero (just one if ``binary``) elsewhere."""
    batch, length = shape
    generator = torch.Generator().manual_seed(0)
    positions, odd = torch.arange(length), torch.arange(batch)[:, None] % 2 == 1
    cut = torch.randint(0, length, (batch, 1), generator=generator)
    coins = torch.rand(shape, generator=generator) < 0.5
    values = [1, 2, 3, 7, 100] + ([-1] if dtype.is_signed else []) + ([0.5] if dtype.is_floating_point else [])
    drawn = torch.tensor(values)[torch.randint(0, len(values), shape, generator=generator)].to(dtype)
    if binary or dtype == torch.bool:
        drawn = torch.ones(shape, dtype=dtype)
    yield drawn * coins
    yield torch.where(odd, positions >= cut, positions <= cut).to(dtype)
    if batch * length * length <= _MANY:
        yield drawn
        yield (positions != cut).to(dtype)


def _sample_sizes(
    program: MaskProgram, queries: tuple[Any, ...], padding: Node | None
) -> tuple[list[dict[Any, int]], str]:
    """Values for the graph's symbols that show what a mask does at every length; and what they leave open, if so.

    A fixed length is the only one there is. Otherwise: the length at hand, short ones, and one that no number in the
    program reaches.
    """
    others = dict(program.symbols)
    length = queries[-1]
    if isinstance(length, int):
        return [{s: _clamp(size, 3) for s, size in others.items()}], ""
    free = length.node.expr.free_symbols
    if len(free) != 1 or not free <= others.keys():
        raise Undecided(f"the sequence length is {length.node.expr}")
    (symbol,) = free
    size = others.pop(symbol)
    batch = _free_symbols(queries[:-1]) | (_free_symbols(shape_of(padding)) if padding is not None else set())
    at_hand = {s: _clamp(other, 3) if s in batch else other.node.hint for s, other in others.items()}

    constant = program.largest_constant()
    *_, beyond = telling = [_clamp(size, n) for n in _telling_lengths(constant)]
    samples = [{symbol: size.node.hint} | at_hand]
    for value in dict.fromkeys(telling):
        if value <= LENGTH_LIMIT:
            samples.append({symbol: value} | {s: _clamp(other, 2) for s, other in others.items()})
    if beyond > LENGTH_LIMIT:
        return samples, f"it holds the number {constant}, too large to try the sequence lengths beyond it"
    if concrete(length, samples[-1]) <= constant and beyond > constant:
        return samples, f"it holds the number {constant}, and a sequence length of {length.node.expr} stays below"
    return samples, ""


def _telling_lengths(constant: int) -> tuple[int, ...]:
    """Short ones, and one that the largest number in a program does not reach."""
    return 2, 5, 2 * constant + 3


def _shorter(program: MaskProgram, length: int, sizes: Sizes) -> tuple[list[tuple[MaskProgram, Sizes]], str]:
    """Samples of shorter lengths in place of a fixed one that is too long to compute, as those of a symbolic length."""
    constant = program.largest_constant(apart=length)
    *_, beyond = telling = _telling_lengths(constant)
    lengths = [n for n in dict.fromkeys(telling) if n <= LENGTH_LIMIT]
    too_large = (
        f"it holds the number {constant}, too large to try a sequence length beyond it, and {length} is too long"
    )
    return [(program.at_length(length, n), sizes) for n in lengths], "" if beyond <= LENGTH_LIMIT else too_large


def _free_symbols(sizes: Sequence[Any]) -> set[Any]:
    return {s for size in sizes if isinstance(size, torch.SymInt) for s in size.node.expr.free_symbols}


def _clamp(size: torch.SymInt, value: int) -> int:
    """The nearest value that the size's known range contains."""
    bounds = size.node.shape_env.bound_sympy(size.node.expr)
    if bounds.lower.is_Integer:
        value = max(value, int(bounds.lower))
    if bounds.upper.is_Integer:
        value = min(value, int(bounds.upper))
    return value


def band_width(mask: Tensor, length: int) -> int | None:
    """w if every query attends to exactly the w keys up to its own position (fewer at the start), else None.

    ``mask``: [..., length, length] or broadcastable to it, bool (True attends) or additive float.
    Exactly causal is w == length.
    """
    if not _square(mask, length):
        return None
    mask = _distinct(mask.expand(*mask.shape[:-2], length, length))
    final = attends(mask[..., -1:, :])
    if final is None:
        return None
    width = int(final.reshape(-1, length)[0].sum())
    keys = torch.arange(length)
    for start, stop in _row_chunks(mask):
        queries = torch.arange(start, stop)[:, None]
        rows = attends(mask[..., start:stop, :])
        if rows is None or not bool((rows == ((keys <= queries) & (keys > queries - width))).all()):
            return None
    return width if width > 0 else None


def follows_padding(mask: Tensor, base: Tensor, real: Tensor, exact: bool) -> bool:
    """Whether ``mask`` is ``base`` and the key is a real token.

    Rows of padding may attend to less (unless ``exact``), or to anything when the rule leaves them nothing.

    Args:
        mask: [B or 1, ..., S, S], bool or additive.
        base: the same for a batch without padding.
        real: bool [B, S].
    """
    batch, length = real.shape
    if not (_square(mask, length) and _square(base, length)):
        return False
    mask, base = (m.expand(*m.shape[:-2], length, length) for m in (mask, base))
    inner = [1] * (mask.dim() - 3)
    keys = real.view(batch, *inner, 1, length)
    queries = real.view(batch, *inner, length, 1)
    for start, stop in _row_chunks(mask):
        got, full = attends(mask[..., start:stop, :]), attends(base[..., start:stop, :])
        if got is None or full is None:
            return False
        rule = full & keys
        if torch.equal(got, rule):
            continue
        wrong = got != rule
        if not exact:
            wrong &= queries[..., start:stop, :] | got
        wrong &= queries[..., start:stop, :] | rule.any(-1, keepdim=True)
        if bool(wrong.any()):
            return False
    return True


def attends(mask: Tensor) -> Tensor | None:
    """bool, True where attention is allowed; None if an additive mask holds anything but 0 and -infinity."""
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        return None
    allowed = mask == 0
    return allowed if bool((allowed | (mask <= BLOCKED)).all()) else None


def _square(mask: Tensor, length: int) -> bool:
    """Whether the mask's last two axes can be expanded to [length, length]."""
    return mask.dim() >= 2 and all(size in (1, length) for size in mask.shape[-2:])


def _distinct(mask: Tensor) -> Tensor:
    """The mask with its expanded (stride 0) batch and head axes narrowed to one entry."""
    for dim in range(mask.dim() - 2):
        if mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask


def _row_chunks(mask: Tensor) -> Iterator[tuple[int, int]]:
    rows = mask.shape[-2]
    step = max(1, _CHUNK // max(1, mask.numel() // max(1, rows)))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)
