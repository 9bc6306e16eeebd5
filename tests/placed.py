"""Decoders in which something trained acts at particular positions: prompts, projectors, markers, token rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import models
import torch
import torch.nn.functional as F
from models import HIDDEN, SEQ, VOCAB
from torch import Tensor, nn

PROMPT, IMAGE, FEATURES = 4, 1, 12
IGNORE = -100

Embed = Any  # a function of the model and its inputs, or Inside


class Placed(models.Decoder):
    """A decoder whose embedding is ``embed(model, ids)``, which may use parameters of the given shapes.

    ``frozen``: only these are trained. Returns the loss; :meth:`logits` what it is computed from.
    """

    def __init__(self, embed: Embed, shapes: Mapping[str, tuple[int, ...]], frozen: bool = True) -> None:
        super().__init__(fused=False)
        self.embed, self.blocks = embed, self.blocks[:2]
        self.requires_grad_(not frozen)
        generator = torch.Generator().manual_seed(3)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator) * 0.3))

    def logits(self, ids: Tensor, *inputs: Tensor) -> Tensor:
        x = self.words(ids) if isinstance(self.embed, Inside) else self.embed(self, ids, *inputs)
        x = self.blocks[0](x)
        if isinstance(self.embed, Inside):
            x = self.embed.change(self, x, ids)
        return self.lm_head(self.ln_f(self.blocks[1](x)))

    def forward(self, ids: Tensor, labels: Tensor, *inputs: Tensor) -> Tensor:
        logits = self.logits(ids, *inputs)
        return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))

    def words(self, ids: Tensor) -> Tensor:
        return self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))


class Inside(NamedTuple):
    """``change(model, x, ids)`` between the blocks, in the place of an embedding."""

    change: Callable[[Any, Tensor, Tensor], Tensor]


def images() -> Tensor:
    """bool [2, SEQ]: where image tokens stand."""
    mask = torch.zeros(2, SEQ, dtype=torch.bool)
    mask[0, 2:5] = mask[1, 1:6] = True
    return mask


def batch(image: int | None = None) -> tuple[Tensor, Tensor]:
    """Ids and labels [2, SEQ]; the first half has no labels, and the image tokens are ``image``, if there are any."""
    ids = torch.randint(2, VOCAB - 2, (2, SEQ), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : SEQ // 2] = IGNORE
    return (ids if image is None else torch.where(images(), image, ids)), labels


# a row for each image token of :func:`images`
SEEN = torch.randn(8, FEATURES, generator=torch.Generator().manual_seed(2))
# which of PROMPT rows stands at an image token, [2, SEQ, PROMPT]: one, nowhere else; and its index, PROMPT elsewhere
CHOICE = F.one_hot(torch.arange(2 * SEQ).view(2, SEQ) % PROMPT, PROMPT).float() * images()[..., None]
INDEX = torch.where(images(), CHOICE.argmax(-1), PROMPT)


def spread(prompt: Tensor, ids: Tensor) -> Tensor:
    return prompt.expand(len(ids), -1, -1)


def prefix_of(size: int) -> Embed:
    """In the place of the first tokens, so that labels line up with positions."""

    def embed(m: Any, ids: Tensor) -> Tensor:
        return torch.cat([spread(m.prompt, ids), m.words(ids[:, size:])], 1)

    return embed


def suffix(m: Any, ids: Tensor) -> Tensor:
    return torch.cat([m.words(ids[:, PROMPT:]), spread(m.prompt, ids)], 1)


def middle(m: Any, ids: Tensor) -> Tensor:
    x = m.words(ids)
    x = torch.cat((x[:, :2], spread(m.prompt, ids), x[:, 2 + PROMPT :]), dim=1)
    return F.layer_norm(x, (HIDDEN,)) * 3.0


def nested(m: Any, ids: Tensor) -> Tensor:
    inner = torch.cat([spread(m.prompt, ids), m.words(ids[:, 2 + PROMPT :])], 1)
    return torch.cat([m.words(ids[:, :2]), inner], 1)


def looked_up(m: Any, ids: Tensor) -> Tensor:
    prompt = F.embedding(torch.arange(PROMPT).unsqueeze(0).expand(len(ids), -1), m.prompt)
    return torch.cat([prompt, m.words(ids[:, PROMPT:])], 1)


def encoded(m: Any, ids: Tensor) -> Tensor:
    prompt = F.linear(F.linear(m.prompt, m.up).tanh(), m.down)
    return torch.cat([spread(prompt, ids), m.words(ids[:, PROMPT:])], 1)


def of_tasks(m: Any, ids: Tensor) -> Tensor:
    return torch.cat([m.prompts[torch.tensor([0, 2])], m.words(ids[:, PROMPT:])], 1)


def padded(m: Any, ids: Tensor) -> Tensor:
    words = F.pad(m.words(ids[:, PROMPT:]), (0, 0, PROMPT, 0))
    return words + F.pad(m.prompt, (0, 0, 0, SEQ - PROMPT))


def sliced(m: Any, ids: Tensor) -> Tensor:
    return torch.slice_scatter(m.words(ids), spread(m.prompt, ids), 1, 2, 2 + PROMPT)


def each(m: Any, ids: Tensor) -> Tensor:
    x = m.words(ids)
    return torch.stack([torch.cat([m.prompt, x[i, PROMPT:]], 0) for i in range(2)])


def sequence_first(m: Any, ids: Tensor) -> Tensor:
    prompt = m.prompt[:, None].expand(-1, len(ids), -1)
    return torch.cat([prompt, m.wte(ids.t())[PROMPT:]], 0).transpose(0, 1)


def indexed(m: Any, ids: Tensor) -> Tensor:
    return m.words(ids).index_add(1, torch.tensor([1, 4, 5, 6]), spread(m.prompt, ids))


def chosen(m: Any, ids: Tensor) -> Tensor:
    choice = F.one_hot(torch.arange(SEQ).clamp(max=PROMPT), PROMPT + 1)[:, :PROMPT]
    return m.words(ids) + choice.float() @ m.prompt


def speaker(m: Any, ids: Tensor) -> Tensor:
    return torch.cat([F.embedding(ids[:, :2] % 5, m.table), m.words(ids[:, 2:])], 1)


def scattered(m: Any, ids: Tensor) -> Tensor:
    x = m.words(ids)
    mask = (ids == IMAGE).unsqueeze(-1).expand_as(x)
    return x.masked_scatter(mask, F.linear(SEEN, m.projector))


def where(m: Any, ids: Tensor) -> Tensor:
    x = m.words(ids)
    seen = F.linear(torch.ones(*ids.shape, FEATURES), m.projector)
    return torch.where((ids != IMAGE)[..., None], x, seen)


def blended(m: Any, ids: Tensor) -> Tensor:
    share = (ids == IMAGE).float()[..., None]
    return m.words(ids) * (1 - share) + m.marker * share


def marked(m: Any, ids: Tensor) -> Tensor:
    return m.words(ids) + m.marker * (ids == IMAGE)[..., None]


def filled(m: Any, ids: Tensor) -> Tensor:
    return m.words(ids).masked_fill((ids == IMAGE)[..., None] & (torch.arange(HIDDEN) < 8), m.number)


def visual(x: Tensor, ids: Tensor) -> Tensor:
    return x * (ids == IMAGE)[..., None]


def expert(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    """At the input of the second block, with an expert of its own."""
    mask = (ids == IMAGE)[..., None]
    return torch.where(mask, x + F.linear(x, m.expert), x) + mask * m.inner


# Products with data, or with what data blanks: a factor acts where the others are not zero.


def chosen_by_each(m: Any, ids: Tensor) -> Tensor:
    return m.words(ids) + torch.einsum("bsp,ph->bsh", CHOICE, m.prompt)


def chosen_by_rows(m: Any, ids: Tensor) -> Tensor:
    return m.words(ids) + CHOICE @ m.prompt


def chosen_by_batches(m: Any, ids: Tensor) -> Tensor:
    return torch.baddbmm(m.words(ids), CHOICE, m.prompt.expand(2, -1, -1))


def chosen_linearly(m: Any, ids: Tensor) -> Tensor:
    return m.words(ids) + F.linear(F.gelu(F.linear(F.dropout(CHOICE, 0.0), m.up)), m.down)


def weighed(m: Any, ids: Tensor) -> Tensor:
    return m.words(ids) + (CHOICE.unsqueeze(-1) * m.prompt).sum(2)


def one_hot(m: Any, ids: Tensor) -> Tensor:
    return m.words(ids) + F.one_hot(INDEX, PROMPT + 1)[..., :PROMPT].float() @ m.prompt


def named(m: Any, ids: Tensor) -> Tensor:
    """A row of zeros elsewhere."""
    return m.words(ids) + F.linear(F.pad(m.prompt, (0, 0, 0, 1))[INDEX], m.down)


def added_by_flag(m: Any, ids: Tensor) -> Tensor:
    return torch.addcmul(m.words(ids), CHOICE.sum(-1, keepdim=True), m.marker)


def adapted(m: Any, ids: Tensor) -> Tensor:
    x = m.words(ids)
    return x + F.linear(F.rms_norm(visual(x, ids), (HIDDEN,), m.scale), m.adapter)


def adapted_elsewhere_zero(m: Any, ids: Tensor) -> Tensor:
    x = m.words(ids)
    first, second = x.masked_fill((ids != IMAGE)[..., None], 0.0).chunk(2, -1)
    return x + F.linear(first * second, m.small)


def adapted_piece(m: Any, ids: Tensor) -> Tensor:
    x = m.words(ids)
    return x + F.linear(torch.cat([x[:, :PROMPT], torch.zeros(2, SEQ - PROMPT, HIDDEN)], 1), m.adapter)


def gated(m: Any, ids: Tensor) -> Tensor:
    """Each of the two factors acts where the mask that is part of the other holds."""
    x = m.words(ids)
    return x + visual(torch.sigmoid(F.linear(x, m.gate)), ids) * m.marker


def own_table(m: Any, ids: Tensor) -> Tensor:
    table = m.table * (torch.arange(VOCAB) == IMAGE)[:, None]
    return m.words(ids) + F.linear(F.embedding(ids, table), m.down)


def put(m: Any, ids: Tensor) -> Tensor:
    return m.words(ids).index_put((ids == IMAGE,), m.marker)


def expert_of_blanked(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    return x + F.linear(visual(x, ids), m.expert).flip(1).flip(1)


def expert_decided(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    """Data and the block decide together."""
    return torch.where(((ids == IMAGE) & (x.mean(-1) < 9.0))[..., None], x + m.inner, x)


def rows_copied(m: Any, ids: Tensor) -> Tensor:
    return F.embedding(ids, m.wte.weight.index_copy(0, torch.tensor([0, IMAGE]), m.rows))


def rows_added(m: Any, ids: Tensor) -> Tensor:
    return F.embedding(ids, torch.cat([m.wte.weight[: VOCAB - 2], m.rows]))


def flipped(m: Any, ids: Tensor) -> Tensor:
    return torch.cat([m.words(ids[:, PROMPT:]), spread(m.prompt, ids)], 1).flip(1)


def summed(m: Any, ids: Tensor) -> Tensor:
    choice = F.one_hot(torch.arange(SEQ).clamp(max=PROMPT), PROMPT + 1)[:, :PROMPT]
    return m.words(ids) + torch.einsum("sp,ph->sh", choice.float(), m.prompt)


def flattened(m: Any, ids: Tensor) -> Tensor:
    return m.words(ids) + (CHOICE.view(-1, PROMPT) @ m.prompt).view(2, SEQ, HIDDEN)


def gathered(m: Any, ids: Tensor) -> Tensor:
    table = torch.cat([m.prompt, torch.zeros(1, HIDDEN)]).expand(2, -1, -1)
    return m.words(ids) + torch.take_along_dim(table, INDEX[..., None], 1)


def convolved(m: Any, ids: Tensor) -> Tensor:
    return m.words(ids) + F.conv1d(CHOICE.mT, m.kernel, padding=1).mT


def turned(m: Any, ids: Tensor) -> Tensor:
    return m.words(ids) + (m.marker * images().flip(1)[..., None]).flip(1)


def put_in_place(m: Any, ids: Tensor) -> Tensor:
    prompt = torch.zeros(2, SEQ, HIDDEN)
    prompt[:, :PROMPT] = m.prompt
    return m.words(ids) + prompt


def rows_in_place(m: Any, ids: Tensor) -> Tensor:
    table = m.wte.weight.clone()
    table[torch.tensor([0, IMAGE])] = m.rows
    return F.embedding(ids, table)


class Mark(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, marker: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return x + mask[..., None] * marker

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        return grad, None, (grad * ctx.saved_tensors[0][..., None]).sum((0, 1))


def marked_by_others(m: Any, ids: Tensor) -> Tensor:
    """An autograd function that is not looked into."""
    return Mark.apply(m.words(ids), (ids == IMAGE).float(), m.marker)


def expert_of_flattened(m: Any, x: Tensor, ids: Tensor) -> Tensor:
    mask = (ids == IMAGE).view(-1, 1)
    return x + F.linear(x.view(-1, HIDDEN) * mask, m.expert).view_as(x)


def padded_and_mixed(m: Any, ids: Tensor) -> Tensor:
    x = F.pad(m.words(ids[:, PROMPT:]), (0, 0, PROMPT, 0)) + F.pad(m.prompt, (0, 0, 0, SEQ - PROMPT))
    return x + 0.1 * x.sort(1).values[:, torch.arange(SEQ)]


def reordered(m: Any, ids: Tensor) -> Tensor:
    x = torch.cat([m.words(ids[:, PROMPT:]), spread(m.prompt, ids)], 1)
    return x[:, torch.arange(SEQ).roll(PROMPT)]


def lerped(m: Any, ids: Tensor) -> Tensor:
    return torch.lerp(m.words(ids), m.marker.expand(*ids.shape, -1), (ids == IMAGE).float()[..., None])


def everywhere(m: Any, ids: Tensor, delta: Tensor) -> Tensor:
    return m.words(ids) + delta


_PROMPT = {"prompt": (PROMPT, HIDDEN)}
_PROJECTOR = {"projector": (HIDDEN, FEATURES)}
_MARKER = {"marker": (HIDDEN,)}
_FIRST = (0, PROMPT)

# name: (embedding, its parameters, the image token, positions [begin, end) or None for those of images())
KNOWN: dict[str, tuple[Embed, dict[str, tuple[int, ...]], int | None, tuple[int, ...] | None]] = {
    "prefix": (prefix_of(PROMPT), _PROMPT, None, _FIRST),
    "suffix": (suffix, _PROMPT, None, (SEQ - PROMPT, SEQ)),
    "middle": (middle, _PROMPT, None, (2, 2 + PROMPT)),
    "nested": (nested, _PROMPT, None, (2, 2 + PROMPT)),
    "looked_up": (looked_up, _PROMPT, None, _FIRST),
    "encoded": (encoded, {"prompt": (PROMPT, 8), "up": (6, 8), "down": (HIDDEN, 6)}, None, _FIRST),
    "of_tasks": (of_tasks, {"prompts": (3, PROMPT, HIDDEN)}, None, _FIRST),
    "padded": (padded, _PROMPT, None, _FIRST),
    "sliced": (sliced, _PROMPT, None, (2, 2 + PROMPT)),
    "each": (each, _PROMPT, None, _FIRST),
    "sequence_first": (sequence_first, _PROMPT, None, _FIRST),
    "indexed": (indexed, _PROMPT, None, (1, 4, 5, 6)),
    "chosen": (chosen, _PROMPT, None, _FIRST),
    "speaker": (speaker, {"table": (5, HIDDEN)}, None, (0, 2)),
    "scattered": (scattered, _PROJECTOR, IMAGE, None),
    "where": (where, _PROJECTOR, IMAGE, None),
    "blended": (blended, _MARKER, IMAGE, None),
    "marked": (marked, _MARKER, IMAGE, None),
    "filled": (filled, {"number": ()}, IMAGE, None),
    "in_a_block": (Inside(expert), {"inner": (HIDDEN,), "expert": (HIDDEN, HIDDEN)}, IMAGE, None),
    "rows_copied": (rows_copied, {"rows": (2, HIDDEN)}, IMAGE, None),
    "rows_added": (rows_added, {"rows": (2, HIDDEN)}, VOCAB - 1, None),
}
PRODUCTS: dict[str, tuple[Embed, dict[str, tuple[int, ...]], int | None, tuple[int, ...] | None]] = {
    "chosen_by_each": (chosen_by_each, _PROMPT, None, None),
    "adapted": (adapted, {"adapter": (HIDDEN, HIDDEN), "scale": (HIDDEN,)}, IMAGE, None),
    "expert_of_blanked": (Inside(expert_of_blanked), {"expert": (HIDDEN, HIDDEN)}, IMAGE, None),
    "own_table": (own_table, {"table": (VOCAB, 6), "down": (HIDDEN, 6)}, IMAGE, None),
    "lerped": (lerped, _MARKER, IMAGE, None),
    "summed": (summed, _PROMPT, None, _FIRST),
    "chosen_by_rows": (chosen_by_rows, _PROMPT, None, None),
    "chosen_by_batches": (chosen_by_batches, _PROMPT, None, None),
    "chosen_linearly": (chosen_linearly, {"up": (6, PROMPT), "down": (HIDDEN, 6)}, None, None),
    "weighed": (weighed, _PROMPT, None, None),
    "one_hot": (one_hot, _PROMPT, None, None),
    "named": (named, {"prompt": (PROMPT, 6), "down": (HIDDEN, 6)}, None, None),
    "added_by_flag": (added_by_flag, _MARKER, None, None),
    "adapted_elsewhere_zero": (adapted_elsewhere_zero, {"small": (HIDDEN, HIDDEN // 2)}, IMAGE, None),
    "adapted_piece": (adapted_piece, {"adapter": (HIDDEN, HIDDEN)}, None, _FIRST),
    "gated": (gated, {"gate": (1, HIDDEN), "marker": (HIDDEN,)}, IMAGE, None),
    "put": (put, _MARKER, IMAGE, None),
    "expert_decided": (Inside(expert_decided), {"inner": (HIDDEN,)}, IMAGE, None),
}
UNKNOWN: dict[str, tuple[Embed, dict[str, tuple[int, ...]], int | None]] = {
    "reordered": (reordered, _PROMPT, None),
    "flattened": (flattened, _PROMPT, None),
    "padded_and_mixed": (padded_and_mixed, _PROMPT, None),
    "put_in_place": (put_in_place, _PROMPT, None),
    "flipped": (flipped, _PROMPT, None),
    "gathered": (gathered, _PROMPT, None),
    "convolved": (convolved, {"kernel": (HIDDEN, PROMPT, 3)}, None),
    "turned": (turned, _MARKER, None),
    "rows_in_place": (rows_in_place, {"rows": (2, HIDDEN)}, IMAGE),
    "marked_by_others": (marked_by_others, _MARKER, IMAGE),
    "expert_of_flattened": (Inside(expert_of_flattened), {"expert": (HIDDEN, HIDDEN)}, IMAGE),
}


def positions(name: str) -> Tensor:
    """bool [2, SEQ]: where the trained part of a known one acts."""
    where = (KNOWN | PRODUCTS)[name][3]
    if where is None:
        return images()
    mask = torch.zeros(2, SEQ, dtype=torch.bool)
    mask[:, list(where) if len(where) > 2 else slice(*where)] = True
    return mask
