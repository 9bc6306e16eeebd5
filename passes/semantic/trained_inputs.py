"""Finds what is trained through positions that no label may select, and sees to it that it learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cggr_compile import compat
from cggr_compile.options import Options
from cggr_compile.passes.analysis.positions import FirstBatch, Region, static_count
from cggr_compile.passes.analysis.reach import Part, Reach, reach
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass
from cggr_compile.passes.facts import Candidates, ExtraRows, FinalStates, LayerStack, LossSite, Routing
from cggr_compile.passes.fx import ancestors
from cggr_compile.passes.nodes import shape_of

if TYPE_CHECKING:
    from torch.fx import GraphModule

# Numbers of positions that depend on data are rounded up to a multiple of this, or of an eighth of the sequence.
STEP = 32
# A region has as many labels as others if the labelled share of its positions is at least this part of the whole's.
LABELLED = 0.5
_OF_LAYERS = ("gradient", "kv_gradient", "kv_weight", "context", "router_layers")


@dataclass(frozen=True)
class Concern:
    """A trained input that acts only at positions that may have no label. ``unknown``: why these are not known."""

    name: str
    regions: tuple[Region, ...]
    unknown: str


class TrainedInputs(SemanticPass):
    """Resolves ``gradient="auto"``: a trained input must not lose its gradient because its positions are not selected.

    A soft prompt in front of the tokens is an example::

        x = cat([prompt.expand(B, -1, -1), embedding(ids)], 1)         # positions 0 to P - 1 have no label

    Its gradient is exactly zero under ``routed``, which gives the residual stream of unselected positions no gradient;
    in dense training it is not. The same holds for a projector whose features are put where an image token stands, a
    marker added at some positions, or ``inputs_embeds`` that a caller differentiates. The positions of such inputs
    become gradient rows beside those that the loss selects (``ExtraRows``), if they are known and no more than half of
    the sequence. Else ``auto`` becomes ``exact``, with a warning, and ``routed`` stays, with a warning.

    What every position shares is left alone, whichever are selected: the table of the tokens, learned positions, a
    norm, an adapter. So is what acts at positions with as many labels as others, in the first batch.
    """

    name = "trained_inputs"
    needs = (LossSite, FinalStates, Candidates)
    uses = (LayerStack,)
    provides = (Routing, ExtraRows)
    analysis = True

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        asked = ctx.options.gradient
        ctx.add(Routing("exact" if asked == "exact" else "routed"))
        if asked == "exact":
            return PassResult(True, "gradient='exact' stops nothing")
        if ctx.level != "routed":
            ctx.add(Routing("exact"))
            return PassResult(True, f"gradient='exact': there are no layers in which to stop any{_unused(ctx)}")
        concerns = _Look(gm, ctx).concerns()
        if not concerns:
            return PassResult(True, "gradient='routed': no trained input acts at unselected positions only")
        details: dict[str, Any] = {"inputs": {c.name: [str(region) for region in c.regions] for c in concerns}}
        known = [concern for concern in concerns if not concern.unknown]
        unknown = [concern for concern in concerns if concern.unknown]
        regions = tuple(dict.fromkeys(region for concern in known for region in concern.regions))
        most, why = self._most(gm, ctx, regions) if known else (0, "")
        if why:
            unknown += [Concern(c.name, c.regions, why) for c in known]
            known = []
        if unknown and asked == "auto":
            ctx.add(Routing("exact"))
            ctx.warnings.append(
                f"gradient='exact' for this graph: {_told(unknown)} under 'routed'. options={{'gradient': 'exact'}} "
                f"says so without a warning, 'routed' overrules it{_unweighed(ctx)}"
            )
            return PassResult(True, f"gradient='exact', for the sake of {_names(unknown)}", details)
        if unknown:
            ctx.warnings.append(
                f"gradient='routed' takes gradient from what is trained: {_told(unknown)}. options={{'gradient': "
                "'exact'}} (or 'auto', the default) gives it back"
            )
        if not known:
            return PassResult(True, f"gradient='routed', as asked, in spite of {_names(unknown)}", details)
        ctx.add(ExtraRows(regions, most))
        details["slots"] = most
        reason = f"gradient='routed', with up to {most} more gradient rows per sequence for {_names(known)}"
        return PassResult(True, reason, details)

    def _most(self, gm: GraphModule, ctx: GraphContext, regions: tuple[Region, ...]) -> tuple[int, str]:
        """Slots that the regions need in a sequence; or why that is not known, or too many."""
        anchor, length = ctx[Candidates].anchor, shape_of(ctx[FinalStates].states)[1]
        if any(anchor in ancestors(region.inputs) for region in regions):
            return 0, "its positions are computed too late"
        most = static_count(regions, length)
        if most is None:
            mask = FirstBatch(gm, ctx).read(regions)
            if isinstance(mask, str):
                return 0, f"their number is not known: {mask}"
            most, step = int(mask.sum(1).max()), min(STEP, max(1, length // 8))
            if most == 0:
                return 0, "the first batch has none of its positions"
            most = min(-(-most // step) * step, length)
        if ctx.options.gradient == "auto" and isinstance(length, int) and 2 * most > length:
            return 0, f"with {most} of {length} positions more, nothing would be saved"
        return most, ""


class _Look:
    """The inputs of one graph that are a concern."""

    def __init__(self, gm: GraphModule, ctx: GraphContext) -> None:
        self.gm, self.ctx = gm, ctx
        self.found: Reach = reach(gm, ctx)
        self.batch = FirstBatch(gm, ctx)
        self._labels: Tensor | str | None = None
        self._shares: dict[Region, bool | None] = {}

    def concerns(self) -> list[Concern]:
        found = []
        for leaf in self.gm.graph.nodes:
            parts = self.found.parts.get(leaf, [])
            bad = [part for part in parts if part.per_example or not self._learns(part)]
            if not bad or (len(bad) < len(parts) and not any(part.per_example for part in bad)):
                continue
            regions = tuple(dict.fromkeys(part.region for part in bad))
            unknown = ""
            if any(region.whole for region in regions):
                narrower = any(part.narrower for part in bad if part.region.whole)
                unknown = "its positions are not known" if narrower else "it has entries for every position"
            found.append(Concern(compat.source_name(leaf), regions, unknown))
        return found

    def _learns(self, part: Part) -> bool:
        """Whether an input gets its gradient from selected positions like any other that all of them share."""
        if part.narrower:
            return False
        if part.region.whole:
            return True
        if any(part.region.covers(text) and self._labelled(text) is not False for text in self.found.tokens):
            return True
        return not part.individual and self._labelled(part.region) is True

    def _labelled(self, region: Region) -> bool | None:
        """Whether the region has as many labels as others, in the first batch; None if that is not known."""
        if region.whole:
            return True
        if region not in self._shares:
            self._shares[region] = self._share(region)
        return self._shares[region]

    def _share(self, region: Region) -> bool | None:
        if self._labels is None:
            self._labels = self.batch.value(self.ctx[Candidates].valid)
        mask = self.batch.read([region])
        if isinstance(self._labels, str) or isinstance(mask, str) or not mask.any() or not self._labels.any():
            return None
        share = (self._labels & mask).sum() / mask.sum()
        return bool(share >= LABELLED * self._labels.float().mean())


def _unused(ctx: GraphContext) -> str:
    """The options that were given and are about layers."""
    default = Options()
    given = {name: getattr(ctx.options, name) for name in _OF_LAYERS}
    named = [f"{name}={value!r}" for name, value in given.items() if value != getattr(default, name)]
    return f"; {', '.join(named)} mean nothing here" if named else ""


def _names(concerns: Sequence[Concern]) -> str:
    names = [concern.name for concern in concerns]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _unweighed(ctx: GraphContext) -> str:
    return f"; kv_weight={ctx.options.kv_weight!r} does nothing here" if ctx.options.kv_weight != "1" else ""


def _told(concerns: Sequence[Concern]) -> str:
    why = "; ".join(dict.fromkeys(concern.unknown for concern in concerns))
    return f"{_names(concerns)} would learn nothing at positions that are not selected ({why})"
