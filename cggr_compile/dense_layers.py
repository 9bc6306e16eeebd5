"""Says where, inside the layers, the row-sparse backward had to compute every position after all."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from cggr_compile.passes.facts import Block
from cggr_compile.passes.joint.row_sparse import RowSparseBackward
from cggr_compile.report import GraphReport


def dense_layers(report: GraphReport, blocks: Sequence[Block], dense: Collection[int] = ()) -> str:
    """One sentence for the user about operators that were made dense in a layer; empty if there are none.

    What is dense outside the layers costs once, not per layer, and is left to ``explain``. So is a token mixer that is
    no attention: its backward is dense by nature. A place that is not known counts as a layer, but where there are
    such mixers: their gradient is added to that of others.

    Args:
        dense: indices of blocks that are dense because of an output (``classify_outputs``), of which another
            warning tells. Sums of gradients have no place: where there are such blocks, they are taken for that
            output's.
    """
    told = [block for i, block in enumerate(blocks) if i in dense]
    blocks = [block for i, block in enumerate(blocks) if i not in dense]
    record = report.record(RowSparseBackward.name)
    if record is None or report.gradient != "routed":
        return ""
    mixers = [block.mixer.name or block.name for block in blocks if block.mixer is not None]
    found = [f"attention in {count} layers: {why}" for why, count in record.details.get("dense_attention", {}).items()]
    for operator, places in record.details.get("densified_at", {}).items():
        inside = [place for place in places if not (told and place is None) and _in_a_layer(place, blocks)]
        inside = [place for place in inside if not (mixers and (place is None or _in(place, mixers)))]
        if inside:
            found.append(f"{operator} {_where(inside)}")
    if not found:
        return ""
    return f"part of the backward still computes every position, correct but slower: {'; '.join(found)}"


def _in_a_layer(place: str | None, blocks: Sequence[Block]) -> bool:
    names = [block.name for block in blocks if not block.name.startswith("block_")]  # those that are module paths
    return place is None or not names or _in(place, names)


def _in(place: str, names: Sequence[str]) -> bool:
    return any(place == name or place.startswith(f"{name}.") for name in names)


def _where(places: list[str | None]) -> str:
    first = places[-1]  # the backward ends with the first layer
    if not first:
        return f"({len(places)} times)" if len(places) > 1 else "(once)"
    return f"in {first} and {len(places) - 1} more" if len(places) > 1 else f"in {first}"
