"""Finds the decoder's layer stack by dataflow; module names only label what was found."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from cggr_compile import compat
from cggr_compile.causes import Cause
from cggr_compile.passes.analysis.effects import mutated_operands
from cggr_compile.passes.analysis.uses import table_of
from cggr_compile.passes.base import GraphContext, PassResult, SemanticPass, refused
from cggr_compile.passes.facts import Attention, Block, FinalStates, LayerStack, LossSite, Mixer, NoLayerStack
from cggr_compile.passes.fx import ancestors, bottlenecks, descendants, in_order
from cggr_compile.passes.nodes import differentiable, fake_value, module_of, op_name, same_size, shape_of
from cggr_compile.passes.patterns import multi_head
from cggr_compile.passes.patterns.attention import find_attention, further_keys
from cggr_compile.passes.patterns.mixer_states import mixer_states, written_states
from cggr_compile.passes.patterns.tail import tail_start
from cggr_compile.passes.patterns.token_mixers import MOVES, kind_of, mixing_calls

if TYPE_CHECKING:
    from torch.fx import GraphModule


class NoLayerStackError(Exception):
    """Why the graph is not a stack of decoder blocks: in words, or a ``cause`` with the fields of its text."""

    def __init__(self, what: str = "", cause: Cause = Cause.UNSUPPORTED_STACK, **fields: object) -> None:
        super().__init__(what)
        self.refusal = refused(cause, what=what, **fields)


class FindStack(SemanticPass):
    """Records the blocks in ``ctx[LayerStack]`` and what follows in ``ctx[FinalStates]``; changes nothing.

    The residual stream is what every path from the embedding to the head goes through. Between two calls that mix
    positions, attentions or others, the last such node is a block boundary::

        x0 = embedding(ids)                     # source
        a0 = x0 + attention(norm(x0))           # on every path, but no boundary: the MLP follows
        x1 = a0 + mlp(norm(a0))                 # output of block 0, input of block 1
        ...
        logits = linear(norm(xL), lm_head)      # states = xL, tail = [norm ...]

    A block may have a token mixer in place of an attention, or both side by side, or several attentions side by side;
    one of the blocks has an attention. Values of earlier layers may go past blocks, to the same position or into keys
    and values: then a boundary is what every path from the last mixing goes through.

    Of any other model ``ctx[NoLayerStack]`` says why it is none of these, and ``find_states`` has its turn.
    """

    name = "find_stack"
    needs = (LossSite,)
    provides = (LayerStack, FinalStates, NoLayerStack)
    analysis = True

    def enabled(self, ctx: GraphContext) -> bool:
        return True

    def __call__(self, gm: GraphModule, ctx: GraphContext) -> PassResult:
        try:
            stack, states = _find(gm, ctx[LossSite])
        except NoLayerStackError as why:
            ctx.add(NoLayerStack(why.refusal))
            return PassResult(False, why.refusal.reason)
        ctx.add(stack)
        ctx.add(states)
        signatures = Counter(block.signature for block in stack.blocks)
        details = {
            "blocks": [
                {
                    "name": block.name,
                    "input": str(block.input),
                    "output": str(block.output),
                    "mixes": list(block.kinds),
                    "signature": block.signature,
                }
                for block in stack.blocks
            ]
        }
        alike = "alike" if len(signatures) == 1 else f"of {len(signatures)} kinds"
        kinds = Counter(block.mixer.kind for block in stack.blocks if block.mixer is not None)
        mixed = "".join(f", {count} with {kind}" for kind, count in kinds.items())
        return PassResult(True, f"{len(stack.blocks)} blocks, {alike}{mixed}", details)


def _find(gm: GraphModule, site: LossSite) -> tuple[LayerStack, FinalStates]:
    reaching = ancestors([site.hidden])
    computed = descendants(site.values)  # from per-token values: what is done to it is the loss's own affair
    roots = _roots(gm, reaching)
    carrying = _carrying(roots)
    stream = carrying & reaching
    states = written_states(gm.graph)  # what a cache is given
    for node in gm.graph.nodes:
        targets = mutated_operands(node)
        if not targets or not any(n in carrying for n in node.all_input_nodes) or computed.issuperset(targets):
            continue
        if node in states.values():
            continue
        # what a layer keeps about itself in a buffer, such as a metric, is not read on the way to the head
        if node.users or any(t.op != "placeholder" or t in reaching or t in carrying for t in targets):
            raise NoLayerStackError(f"{op_name(node)!r} ({node}) writes in place, to or from the residual stream")
    ordered = in_order(gm.graph, stream)
    place = {node: i for i, node in enumerate(gm.graph.nodes)}
    attentions, calls, boundaries = _along(gm, ordered, roots, stream, place)
    blocks = []
    for i, (begin, end) in enumerate(pairwise(boundaries)):
        body = [n for n in ordered if place[begin] < place[n] <= place[end]]
        inside = set(body)
        own = tuple(attention for attention in attentions if attention.node in inside)
        mixer = _mixer([n for n in calls if n in inside])
        block = Block(begin, end, own, mixer, "", _signature(body))
        blocks.append(replace(block, name=_block_name(block.mixing[0], i)))
    _check_repetition(blocks)
    known = mixer_states(gm.graph, blocks)
    for node, write in states.items():
        if node not in known and any(source in carrying for source in write.all_input_nodes):
            raise NoLayerStackError(f"'copy' ({write}) writes in place, from the residual stream to what is returned")
    last = boundaries[-1]
    tail = _tail(ordered, last, place)
    start = tail_start(tail, last)
    if isinstance(start, str):
        raise NoLayerStackError(start)
    return LayerStack(boundaries[0], tuple(blocks)), FinalStates(last, tail, start, frozenset(stream))


def _along(
    gm: GraphModule, ordered: list[Node], roots: list[Node], stream: set[Node], place: dict[Node, int]
) -> tuple[list[Attention], list[Node], list[Node]]:
    """The attentions, what else mixes positions, and the blocks' boundaries.

    They are on the first of :func:`_paths` that has a boundary before and after each.

    Raises:
        NoLayerStackError: none has; says why not the first.
    """
    refusals = []
    for path in _paths(ordered, roots, stream):
        # a prompt may be in front of the embedding, which may be narrower than the stream: what attention sees counts
        for shape in _stream_shapes(path):
            attentions = _attentions(ordered, roots, stream, *shape[:2])
            if not attentions:
                continue
            along = [n for n in path if _has_shape(n, *shape)]
            calls = mixing_calls(ordered, stream, attentions, along[0])
            found = _boundaries(along, attentions, calls, place)
            if not isinstance(found, str):
                past = _past_boundaries(ordered, stream, attentions, found, place)
                if past is None:
                    return attentions, calls, [*found[:-1], _end(ordered, stream, along, found[-1], place)]
                found = f"{past}, which is no value [batch, sequence, ...], goes past a block"
            refusals.append(found)
    if refusals:
        raise NoLayerStackError(refusals[0])
    path = _common_path(ordered, roots)
    if not path:
        raise NoLayerStackError("no node lies on every path from the embedding to the head")
    if not _stream_shapes(path):
        raise NoLayerStackError("no residual stream of shape [batch, sequence, hidden] from embedding to head")
    raise _no_attention(gm, stream)


def _end(ordered: list[Node], stream: set[Node], along: list[Node], last: Node, place: dict[Node, int]) -> Node:
    """Where the last block ends: at ``last``, or at what is computed of it and of values that go past the block."""
    behind = descendants([last])
    if not any(source in stream - behind for n in _tail(ordered, last, place) for source in n.all_input_nodes):
        return last
    ends = [last, *(n for n in along if place[n] > place[last])]
    return next((n for n in ends if not isinstance(tail_start(_tail(ordered, n, place), n), str)), last)


def _tail(ordered: list[Node], last: Node, place: dict[Node, int]) -> tuple[Node, ...]:
    behind = descendants([last])
    return tuple(n for n in ordered if place[n] > place[last] and n in behind)


def _attentions(
    ordered: list[Node], roots: list[Node], stream: set[Node], batch: object, length: object
) -> list[Attention]:
    """Attentions over the sequence: where tokens are looked up, those that see them (others are of images)."""
    tokens = [root for root in roots if _is_by_position(root, batch, length)]
    seeing = descendants(tokens) if tokens else stream
    return [a for n in ordered if n in seeing and (a := find_attention(n, stream, batch, length)) is not None]


def _paths(ordered: list[Node], roots: list[Node], stream: set[Node]) -> Iterator[list[Node]]:
    """Where the residual stream may run, the likeliest first.

    Nodes that every path from embedding to head crosses; or every path from the last mixing of positions.
    """
    # several embeddings (tokens, positions) join before the first block: look from the join on
    yield _common_path(ordered, roots)
    learned = [root for root in roots if root is roots[0] or _is_trained(root)]
    if len(learned) < len(roots):  # a fixed table of positions may go into every layer: look without it
        carrying = _carrying(learned)
        yield _common_path([node for node in ordered if node in carrying], learned)
    yield _path_beside(ordered, roots, stream)


def _table(node: Node) -> Node | None:
    """Of a lookup: ``embedding(ids, table)``, or ``table[ids]`` and ``index_select(table, 0, ids)`` on a matrix."""
    read = table_of(node)
    if read is None or not fake_value(read[0]).is_floating_point():
        return None
    return read[0]


def _is_trained(root: Node) -> bool:
    table = _table(root)
    return table is None or bool(fake_value(table).requires_grad)


def _is_constant(table: Node) -> bool:
    """Whether a table is no weight: that of rotary angles, say, which joins the stream in the first attention."""
    value = fake_value(table)
    return not value.requires_grad and not isinstance(value, torch.nn.Parameter)


_SHAPE_ONLY = {
    "new_ones",
    "new_zeros",
    "new_empty",
    "new_full",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
} | {*("rand_like", "randn_like", "randint_like")}


def _carrying(roots: list[Node]) -> set[Node]:
    """Nodes that hold values of the roots: no sizes (dynamic shapes), masks, constants or noise of their shape."""
    found: set[Node] = set()
    todo = list(roots)
    while todo:
        node = todo.pop()
        value = fake_value(node)
        tensors = value if isinstance(value, (tuple, list)) else (value,)
        floats = any(isinstance(t, torch.Tensor) and t.is_floating_point() for t in tensors)
        if node in found or not floats or op_name(node) in _SHAPE_ONLY:
            continue
        found.add(node)
        todo.extend(node.users)
    return found


def _roots(gm: GraphModule, reaching: set[Node]) -> list[Node]:
    tables = {n: table for n in gm.graph.nodes if n in reaching and (table := _table(n)) is not None}
    # rows of hidden states, as experts take them, are no lookup
    inside = descendants(list(tables))
    tables = {n: table for n, table in tables.items() if table not in inside}
    embeddings = [n for n, table in tables.items() if not _is_constant(table)]
    if tables:
        return embeddings or list(tables)
    # inputs_embeds given by the caller
    floats = [
        n
        for n in gm.graph.nodes
        if n.op == "placeholder"
        and n in reaching
        and isinstance(value := fake_value(n), torch.Tensor)
        and not isinstance(value, torch.nn.Parameter)
        and value.is_floating_point()
        and value.dim() == 3
    ]
    if not floats:
        raise NoLayerStackError("no token embedding before the head")
    return floats[:1]


def _no_attention(gm: GraphModule, stream: Collection[Node]) -> NoLayerStackError:
    """Why no attention was found."""
    closed = next((node for node in gm.graph.nodes if op_name(node) == multi_head.NAME), None)
    if closed is not None:
        call = multi_head.read_call(closed)
        why = call if isinstance(call, str) else "open_attention is switched off"
        return NoLayerStackError(cause=Cause.UNSUPPORTED_ATTENTION, module=_module_path(closed), why=why)
    further = next((more for node in gm.graph.nodes if (more := further_keys(node, stream)) > 0), 0)
    if further:
        return NoLayerStackError(
            f"its attention sees {further} keys that are no positions of the sequence: those of prefix tuning, or of a "
            "cache with entries"
        )
    hidden_in = sorted({str(n.target) for n in gm.graph.nodes if isinstance(n.target, compat.HigherOrderOperator)})
    if "tag_activation_checkpoint" in hidden_in:
        return NoLayerStackError(cause=Cause.CLOSED_CHECKPOINTS)
    saw = f" (saw {hidden_in})" if hidden_in else ""
    return NoLayerStackError(f"no attention over the sequence between embedding and head{saw}")


def _module_path(node: Node) -> str:
    """Of the module that called ``node``; what the node is called, for a call outside of any module."""
    paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return paths[-1].partition(".")[2] or paths[-1] if paths else str(node)


def _common_path(ordered: list[Node], roots: list[Node]) -> list[Node]:
    found = bottlenecks(ordered)
    if len(roots) == 1:
        return found
    last_root = max(ordered.index(r) for r in roots)
    return [n for n in found if ordered.index(n) > last_root]


def _path_beside(ordered: list[Node], roots: list[Node], stream: set[Node]) -> list[Node]:
    """The path from one mixing of positions to the next, without what goes past them to the same position.

    Such is an embedding for each layer (Gemma 4), computed before the first attention, the embedding in every layer
    (Zamba), or a state that waits while another one takes some layers (HRM)::

        beside = embed_per_layer(ids) + project(x0)
        x1 = mlp(x0 + attention(norm(x0))); x1 = x1 + out(gate(x1) * beside[:, :, 0])

    Its gradient needs no gate: an unselected position's is that of the stream there. Empty: there is no such path.
    """
    for shape in _stream_shapes(roots):
        attentions = _attentions(ordered, roots, stream, *shape[:2])
        start = next(root for root in roots if _has_shape(root, *shape))
        mixing = {attention.node for attention in attentions}.union(mixing_calls(ordered, stream, attentions, start))
        calls = [n for n in ordered if n in mixing] if attentions else []
        if not calls or (entry := _entry(ordered, roots, calls, stream, shape)) is None:
            continue
        if any(root > entry and _is_trained(root) and not _is_by_position(root, *shape[:2]) for root in roots):
            return []  # what is learned of each place of a sequence, not of each token
        path = [entry]
        for i, call in enumerate(calls):
            inside = descendants([call])
            found = bottlenecks([n for n in ordered if n in inside])[1:]
            if calls[i + 1 :]:
                before = ancestors([calls[i + 1]]) - {calls[i + 1]}
                found = [n for n in found if n in before]
            path += found
        return path
    return []


def _entry(
    ordered: list[Node], roots: list[Node], calls: list[Node], stream: set[Node], shape: tuple[object, ...]
) -> Node | None:
    """The value [B, S, H] that the first mixing of positions is computed from, and that is added to its result.

    Where none is added, the last one that every mixing is computed from.
    """
    first = calls[0]
    inside = descendants([first])
    beside = [(n, source) for n in ordered if n in inside - {first} for source in n.all_input_nodes if source in stream]
    for n, source in beside:
        if source in inside or not (_has_shape(source, *shape) and _has_shape(n, *shape)):
            continue
        fed = (ancestors([first]) & stream) - ancestors([source])
        if all(other is source or other in fed for n in fed for other in n.all_input_nodes if other in stream):
            return source
    before = ancestors([first]) - {first}
    feeding = [n for n in ordered if n in before]
    through = [n for n in _common_path(feeding, [n for n in roots if n in feeding]) if _has_shape(n, *shape)]
    return next((n for n in reversed(through) if descendants([n]).issuperset(calls)), None)


def _past_boundaries(
    ordered: list[Node],
    stream: set[Node],
    attentions: list[Attention],
    boundaries: list[Node],
    place: dict[Node, int],
) -> Node | None:
    """What goes past a boundary though it has no row for each position; None: nothing but keys and values.

    Of these the attention that reads them has a gate.
    """
    batch, length, _ = shape_of(boundaries[0])
    gates = {(a.key, a.key_user) for a in attentions} | {(a.value, a.value_user) for a in attentions}
    gated = {node for node, _ in gates}
    carried = descendants([boundaries[0]]) | {n for n in stream if differentiable(n)}
    inner = boundaries[1:-1]
    for node in ordered:
        begin = next((b for b in reversed(inner) if place[b] < place[node]), None)
        if begin is None:
            continue
        for source in node.all_input_nodes:
            if source not in carried or place[source] >= place[begin] or (source, node) in gates:
                continue
            value = fake_value(source)
            rows = not isinstance(value, torch.Tensor) or not value.is_floating_point()
            rows = rows or _is_by_position(source, batch, length)
            if not rows and boundaries[-1] in descendants([node], stop=gated):
                return source
    return None


def _is_by_position(node: Node, batch: object, length: object) -> bool:
    shape = shape_of(node)
    return len(shape) >= 2 and same_size(shape[0], batch) and same_size(shape[1], length)


def _stream_shapes(spine: list[Node]) -> list[tuple[object, object, object]]:
    """The shapes that a residual stream may have, in the order in which they appear."""
    found: list[tuple[object, object, object]] = []
    for node in spine:
        shape = shape_of(node)
        if len(shape) == 3 and isinstance(shape[2], int) and not any(_has_shape(node, *other) for other in found):
            found.append((shape[0], shape[1], shape[2]))
    return found


def _has_shape(node: Node, *sizes: object) -> bool:
    shape = shape_of(node)
    return len(shape) == len(sizes) and all(same_size(a, b) for a, b in zip(shape, sizes, strict=True))


def _boundaries(
    spine: list[Node], attentions: list[Attention], calls: list[Node], place: dict[Node, int]
) -> list[Node] | str:
    """One boundary before each attention and each other mixer, and one after the last; or why there are none.

    Attentions side by side, of one layer, have one together.

    What mixes positions in front of the residual stream, or of the first position of it, is no block.
    """
    found: list[Node] = []
    for i, attention in enumerate(attentions):
        upto = place[attention.node]
        after = place[attentions[i - 1].node] if i else -1
        candidates = [n for n in spine if after < place[n] < upto]
        if candidates:
            found.append(candidates[-1])
        elif not i or attention.node in descendants([attentions[i - 1].node]):  # else they are side by side
            return f"no residual stream between attention {i - 1} and attention {i}"
    mixing = [n for n in calls if op_name(n) not in MOVES]
    first = min([place[found[0]], *map(place.__getitem__, mixing)])
    last = max(place[n] for n in (*(a.node for a in attentions), *calls))
    for call in calls:
        if op_name(call) in MOVES and place[call] <= first:
            continue  # a prompt is put in front of the tokens, which moves them at most
        found += [n for n in spine if place[n] < place[call]][-1:]
    # the last block ends at its residual addition: what follows is the final norm
    rest = [n for n in spine if place[n] >= last]
    sums = [n for n in rest if op_name(n) == "add"]
    if not rest:
        return "no residual stream after the last attention"
    return [*sorted(set(found), key=place.__getitem__), (sums or rest)[-1]]


def _mixer(calls: list[Node]) -> Mixer | None:
    if not calls:
        return None
    paths = [module_of(node).split(".") for node in calls]
    common = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*paths, strict=False))]
    return Mixer(kind_of(calls), tuple(calls), ".".join(common))


def _block_name(node: Node, index: int) -> str:
    """The module path up to the layer number, e.g. ``model.layers.0``."""
    for path, _ in reversed(list(node.meta.get("nn_module_stack", {}).values())):
        parts = path.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        if numbers:
            return ".".join(parts[1 : numbers[-1] + 1])
    return f"block_{index}"


def _signature(body: list[Node]) -> str:
    """Equal for isomorphic blocks: operators, ranks and static widths, in order."""
    lines = []
    for node in body:
        shape = shape_of(node)
        lines.append(f"{op_name(node)}/{len(node.all_input_nodes)}/{len(shape)}/{shape[-1] if shape else ''}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:8]


def _check_repetition(blocks: list[Block]) -> None:
    alone = [block for block in blocks if block.mixer is None]
    kinds = {block.signature for block in alone}
    if len(alone) >= 3 and len(kinds) == len(alone):
        raise NoLayerStackError(f"{len(alone)} attentions, but no two blocks are alike: not a layer stack")
