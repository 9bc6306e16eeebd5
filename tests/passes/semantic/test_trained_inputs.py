"""Which trained inputs act at particular positions only, and at which."""

from __future__ import annotations

import models
import placed
import pytest
import torch
import torch.nn.functional as F
from capture import Captured, execute
from models import HIDDEN, SEQ, VOCAB

from cggr_compile.passes.analysis.positions import Flags, Listed, Region, union
from cggr_compile.passes.facts import ExtraRows, Routing, Selection
from cggr_compile.passes.fx import Emitter
from cggr_compile.passes.semantic.trained_inputs import TrainedInputs

LABELS = {"selection": "labels", "max_selected": 1.0, "context": 0}


def captured(embed: placed.Embed, shapes: dict[str, tuple[int, ...]], image: int | None = None, **options) -> Captured:
    frozen = options.pop("frozen", True)
    inputs = options.pop("inputs", ())
    model = placed.Placed(embed, shapes, frozen=frozen)
    return Captured(lambda *args: model(*args), *placed.batch(image), *inputs, options={**LABELS, **options})


@pytest.mark.parametrize("name", [*placed.KNOWN, *placed.PRODUCTS])
def test_known_positions(name: str) -> None:
    embed, shapes, image, _ = (placed.KNOWN | placed.PRODUCTS)[name]
    graph = captured(embed, shapes, image)
    result = graph.run("trained_inputs")
    again = TrainedInputs()(graph.gm, graph.ctx)
    assert again == result and graph.ctx[Routing].gradient == "routed" and not graph.ctx.warnings
    assert {n.rsplit(".", 1)[-1] for n in result.details["inputs"]} == set(shapes), result.details
    wanted = placed.positions(name)
    extra = graph.ctx.get(ExtraRows)
    assert extra is not None and int(wanted.sum(1).max()) <= extra.most <= SEQ // 2
    graph.run("select_rows")
    graph.check_shapes()
    gradient, selection = graph.ctx[Selection].gradient, graph.ctx[Selection]
    assert gradient.rows.meta["example_value"].shape[1] == min(SEQ, SEQ + extra.most)
    values = execute(
        graph, gradient.extra, gradient.rows, gradient.keep, gradient.places, selection.rows, selection.keep
    )
    mask, rows, keep, places, selected, used = values
    assert torch.equal(mask, wanted)
    assert torch.equal(rows.gather(1, places)[used], selected[used])
    found = torch.zeros_like(mask).scatter(1, rows, keep)
    assert torch.equal(found, wanted | torch.zeros_like(mask).scatter(1, selected, used))


@pytest.mark.parametrize("name", placed.UNKNOWN)
def test_unknown_positions(name: str) -> None:
    embed, shapes, image = placed.UNKNOWN[name]
    graph = captured(embed, shapes, image)
    graph.run("trained_inputs")
    assert graph.ctx[Routing].gradient == "exact" and graph.ctx.get(ExtraRows) is None
    (warning,) = graph.ctx.warnings
    assert next(iter(shapes)) in warning and "'exact'" in warning and "positions are not known" in warning
    asked = captured(embed, shapes, image, gradient="routed")
    asked.run("trained_inputs")
    assert asked.ctx[Routing].gradient == "routed" and asked.ctx.get(ExtraRows) is None
    (warning,) = asked.ctx.warnings
    assert next(iter(shapes)) in warning and "takes gradient" in warning


def test_most_of_the_sequence() -> None:
    """More positions than pay."""
    graph = captured(placed.prefix_of(10), {"prompt": (10, HIDDEN)})
    graph.run("trained_inputs")
    assert graph.ctx[Routing].gradient == "exact" and "10 of 16" in graph.ctx.warnings[0]
    asked = captured(placed.prefix_of(10), {"prompt": (10, HIDDEN)}, gradient="routed")
    asked.run("trained_inputs")
    assert asked.ctx.get(ExtraRows).most == 10 and not asked.ctx.warnings


def test_exact_is_left_alone() -> None:
    embed, shapes, image, _ = placed.KNOWN["prefix"]
    graph = captured(embed, shapes, image, gradient="exact")
    assert graph.run("trained_inputs").matched
    assert graph.ctx[Routing].gradient == "exact" and graph.ctx.get(ExtraRows) is None and not graph.ctx.warnings


def test_input_embeddings() -> None:
    delta = torch.zeros(2, SEQ, HIDDEN, requires_grad=True)
    graph = captured(placed.everywhere, {}, inputs=(delta,), frozen=False)
    graph.run("trained_inputs")
    assert graph.ctx[Routing].gradient == "exact"
    assert "entries for every position" in graph.ctx.warnings[0]
    frozen = captured(placed.everywhere, {}, inputs=(delta.detach(),), frozen=False)
    frozen.run("trained_inputs")
    assert frozen.ctx[Routing].gradient == "routed" and not frozen.ctx.warnings


def test_a_batch_without_images() -> None:
    """How many there will be is not known."""
    embed, shapes, _, _ = placed.KNOWN["marked"]
    graph = captured(embed, shapes)
    graph.run("trained_inputs")
    assert graph.ctx[Routing].gradient == "exact" and "first batch has none" in graph.ctx.warnings[0]


# What every position shares, or what acts where labels are as common as elsewhere.


def adapted(m, ids):
    x = m.words(ids)
    return F.layer_norm(x + F.linear(x, m.adapter), (HIDDEN,), m.scale)


def blanked(m, ids):
    """Padding set to zero."""
    return F.linear(m.words(ids), m.adapter) * (ids != 0)[..., None] * m.scale


def of_types(m, ids):
    return m.words(ids) + torch.where((ids % 2 == 0)[..., None], m.scale, m.other)


def own_positions(m, ids):
    return m.wte(ids) + m.delta


def low_rank(m, ids):
    return m.words(ids) + F.embedding(ids, m.a) @ m.b


def dropped(m, ids):
    """Some positions, at random."""
    x = m.words(ids)
    return x + F.linear(x, m.adapter) * (torch.rand(2, SEQ, 1) > 0.3) * m.scale


def convolved(m, ids):
    return F.conv1d(m.words(ids).mT, m.kernel, padding=1).mT


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        return grad * scale, (grad * x).sum((0, 1))


def normed_by_others(m, ids):
    """An autograd function that is not looked into."""
    return Scale.apply(m.words(ids), m.scale)


def masked_table(m, ids):
    return F.embedding(ids, m.wte.weight * (torch.arange(VOCAB) != 0)[:, None]) * m.scale


def projected(m, ids):
    return F.linear(m.words(ids).view(-1, HIDDEN), m.adapter).view(*ids.shape, HIDDEN)


FEATURES = torch.randn(2, SEQ, 6, generator=torch.Generator().manual_seed(4))


def features_beside(m, ids):
    """Data at every position, and sinusoids."""
    return m.words(ids) + FEATURES @ m.a + F.linear(FEATURES[0].sin(), m.b)


def padding_blanked(m, ids):
    mask = (torch.arange(SEQ) > 1).expand(2, -1)[..., None]
    return F.linear(m.words(ids) * mask, m.adapter) * mask * m.scale


def types_one_hot(m, ids):
    return m.words(ids) + F.one_hot(ids % 2, 2).float() @ m.types


def by_hand(m, ids):
    x = m.words(ids)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + m.scale)
    return x + F.linear(x * (x > 0), m.adapter)


def summed_so_far(m, ids):
    x = m.words(ids)
    return x + F.linear(torch.cat([x, F.pad(x, (0, 0, 1, -1))], -1).cumsum(1), m.wide)


def rotated(m, x, ids):
    """In a block: a table of data on the features, and positions that change places."""
    angles = FEATURES[0].repeat(1, 6)[:, :HIDDEN]
    return x + F.linear(F.linear(x, m.adapter) * angles, m.other).flip(1)


SHARED = {
    "projected": (projected, {"adapter": (HIDDEN, HIDDEN)}),
    "features_beside": (features_beside, {"a": (6, HIDDEN), "b": (HIDDEN, 6)}),
    "padding_blanked": (padding_blanked, {"adapter": (HIDDEN, HIDDEN), "scale": (HIDDEN,)}),
    "types_one_hot": (types_one_hot, {"types": (2, HIDDEN)}),
    "by_hand": (by_hand, {"adapter": (HIDDEN, HIDDEN), "scale": (HIDDEN,)}),
    "summed_so_far": (summed_so_far, {"wide": (HIDDEN, 2 * HIDDEN)}),
    "rotated": (placed.Inside(rotated), {"adapter": (HIDDEN, HIDDEN), "other": (HIDDEN, HIDDEN)}),
    "adapted": (adapted, {"adapter": (HIDDEN, HIDDEN), "scale": (HIDDEN,)}),
    "blanked": (blanked, {"adapter": (HIDDEN, HIDDEN), "scale": (HIDDEN,)}),
    "of_types": (of_types, {"scale": (HIDDEN,), "other": (HIDDEN,)}),
    "own_positions": (own_positions, {"delta": (SEQ, HIDDEN)}),
    "low_rank": (low_rank, {"a": (VOCAB, 3), "b": (3, HIDDEN)}),
    "dropped": (dropped, {"adapter": (HIDDEN, HIDDEN), "scale": (HIDDEN,)}),
    "convolved": (convolved, {"kernel": (HIDDEN, HIDDEN, 3)}),
    "normed_by_others": (normed_by_others, {"scale": (HIDDEN,)}),
    "masked_table": (masked_table, {"scale": (HIDDEN,)}),
}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("name", SHARED)
def test_shared_by_all_positions(name: str, frozen: bool) -> None:
    graph = captured(*SHARED[name], frozen=frozen)
    result = graph.run("trained_inputs")
    assert result.matched and not result.details and not graph.ctx.warnings
    assert graph.ctx[Routing].gradient == "routed" and graph.ctx.get(ExtraRows) is None


@pytest.mark.parametrize("name", ["prefix", "middle", "looked_up", "scattered", "where", "blended", "rows_copied"])
def test_the_rest_of_the_model(name: str) -> None:
    """Fully trained: only what is placed is a concern, not the tokens beside it."""
    embed, shapes, image, _ = placed.KNOWN[name]
    graph = captured(embed, shapes, image, frozen=False)
    details = graph.run("trained_inputs").details
    assert {n.rsplit(".", 1)[-1] for n in details["inputs"]} == set(shapes)


class Regularised(placed.Placed):
    def forward(self, ids, labels, *inputs):
        return super().forward(ids, labels, *inputs) + 1e-3 * self.prompt.square().sum()


def test_a_regulariser_is_no_way_through_the_model() -> None:
    """It gives a prompt a gradient, but not the one of the labels."""
    embed, shapes, *_ = placed.KNOWN["prefix"]
    model = Regularised(embed, shapes)
    graph = Captured(lambda *args: model(*args), *placed.batch(), options=LABELS)
    assert next(iter(graph.run("trained_inputs").details["inputs"])).endswith("prompt")


def test_a_deep_encoder() -> None:
    """Deeper than Python's stack: what comes out is zero where what goes in is."""

    def encoded(m, ids):
        x = placed.CHOICE @ m.prompt
        for _ in range(400):
            x = x.tanh()
        return m.words(ids) + x @ m.adapter

    graph = captured(encoded, {"prompt": (placed.PROMPT, HIDDEN), "adapter": (HIDDEN, HIDDEN)})
    assert len(graph.run("trained_inputs").details["inputs"]) == 2
    assert graph.ctx[Routing].gradient == "routed" and graph.ctx.get(ExtraRows) is not None


def test_labelled_images() -> None:
    """Where image tokens have labels like others, their projector learns like the rest of the model."""
    embed, shapes, image, _ = placed.KNOWN["where"]
    ids, _ = placed.batch(image)
    model = placed.Placed(embed, shapes)
    graph = Captured(lambda *args: model(*args), ids, ids, options=LABELS)
    assert not graph.run("trained_inputs").details


@pytest.mark.parametrize("name", [*models.FAMILIES, *models.OTHER_FAMILIES])
def test_families(name: str) -> None:
    """No model of transformers has a concern when all of it is trained."""
    batch = models.make_batch()
    graph = Captured(models.family(name), **batch, options=LABELS)
    try:
        result = graph.run("trained_inputs")
    except AssertionError:
        pytest.skip("not matched")
    assert result.matched and not result.details and graph.ctx[Routing].gradient == "routed"


def test_union_of_regions(decoder_step) -> None:
    """A mask is the same in the graph and by hand, whatever is on record twice."""
    graph = decoder_step()
    inputs = graph.gm.graph.find_nodes(op="placeholder")
    ids = next(node for node in inputs if node.meta["example_value"].dtype == torch.int64)
    emit = Emitter(graph.gm.graph, graph.ctx.fake_mode)
    with emit.before(graph.gm.graph.output_node(), "test"):
        even = emit.call(torch.eq, emit.call(torch.remainder, ids, 2), 0)
        listed = emit.call(torch.arange, 2)
        regions = [
            Region(2, 5),
            Region(2, 5),
            Region(8, None).where(Flags(even, 1, 0)),
            Region(0, 8).where(Flags(even, 1, 0), False).within(6, None),
            Region().where(Listed(listed, 14)),
        ]
        mask = union(emit, regions, 2, SEQ, ids.meta["example_value"].device)
    (found,) = execute(graph, mask)
    place, given = torch.arange(SEQ), graph.inputs[inputs.index(ids)]
    wanted = ((place >= 2) & (place < 5)).expand(2, -1) | (place >= 14)
    wanted = wanted | ((place >= 8) & (given % 2 == 0)) | ((place >= 6) & (place < 8) & (given % 2 != 0))
    assert torch.equal(found, wanted)
