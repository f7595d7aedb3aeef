"""Linear attention in chunks of tokens, as it was read from a graph, and the op that is written for it.

    out = pairs + read
    pairs[c, i] = sum over j of c:  (query_i . key_j) * exp(G[c, i] - G[c, j]) * value_j        for j up to i
    read[c, i]  = query_i @ before[c] * exp(G[c, i])

`before` is what `chunk_states` reads; G is a cumulative sum of gates in each chunk, and the pairs decay by
its differences, or by segment sums. `read` only looks.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph import ops
from effopt.graph.analyses.heads import equal
from effopt.graph.analyses.masks.conditions import axes_of
from effopt.graph.analyses.masks.moves import MOVES, Place, aligned, source_of
from effopt.graph.analyses.masks.sums import Axis, Sum, of, whole
from effopt.graph.analyses.padding import zeros_around
from effopt.graph.analyses.placed import Placed
from effopt.graph.analyses.products import Product, product_at
from effopt.graph.chunk_states import Chunked, States, require_alone, require_carried, states_in, weight_of
from effopt.graph.chunk_tokens import Tokens, by_tokens, written
from effopt.graph.dataflow import calls_down_to
from effopt.graph.layouts import laid_out_as, require_dense
from effopt.graph.linear_attention_decay import Where, behind_the_key, require_causal
from effopt.graph.rewrite import Emit, Reject, require
from effopt.graph.values import is_floating, shape_of, val

_aten = torch.ops.aten
_T = TypeVar("_T")
_APART = ("batch", "head", "chunk", "query", "n")
_ORDERS = (("batch", "chunk", "query", "head", "n"), _APART)
"""Of the dimensions of the sum: as `transformers` and the paper have them, and with heads ahead."""


@dataclass(frozen=True)
class Final:
    """The state after the last chunk, and which axis each of its dimensions is."""

    node: Node
    axes: tuple[str, ...]


@dataclass(frozen=True)
class ChunkedForm:
    """What one sum means."""

    chunked: Chunked
    tokens: Tokens
    finals: tuple[Final, ...]
    order: tuple[str, ...]
    """The axes of the sum."""
    root: Node
    nodes: tuple[Node, ...]
    """All that the op takes the place of."""


def read(root: Node) -> ChunkedForm:
    """The linear attention that a sum of five dimensions computes. Raises `Reject`."""
    sizes = shape_of(root)
    plain = len(sizes) == 5 and is_floating(root) and len(root.args) == 2 and not root.kwargs
    require(plain, "", root)
    try:
        return _first(partial(_read, root, order) for order in _ORDERS)
    except Reject as why:
        raise why if why.reason else _without_reason(root) from None


def _first(ways: Iterable[Callable[[], _T]]) -> _T:
    """What the first way that fits gives. Raises `Reject` with the first reason, if there is one."""
    told = Reject("")
    for way in ways:
        try:
            return way()
        except Reject as why:
            told = told if told.reason else why
    raise told


def _without_reason(root: Node) -> Reject:
    """What is said of a sum that reads states of chunks, and is not the form."""
    words = (
        "states of chunks are added to what is no product of queries, keys, values and one decay of gates,"
        " with two tokens a chunk and two channels at least"
    )
    return Reject(words if _reads_states(root) else "", root)


def _terms(root: Node, place: Place) -> list[tuple[Node, Place]]:
    """The tensors that a sum is of, each with the place in it that is read; those that are known."""
    given = [(x, aligned(x, shape_of(root), place)) for x in root.args if isinstance(x, Node)]
    return [(x, at) for x, at in given if at is not None]


def _reads_states(root: Node) -> bool:
    """Whether one of the terms reads a sum over a state and those of chunks."""
    place = tuple(of(Axis(str(dim), size)) for dim, size in enumerate(shape_of(root)))
    for operand, at in _terms(root, place):
        try:
            if states_in(product_at(operand, at), root):
                return True
        except Reject:
            continue
    return False


def _require_known(root: Node, sizes: dict[str, Any]) -> None:
    """That chunks are counted in numbers, which is said where it may be the form."""
    if isinstance(sizes["chunk"], int) and isinstance(sizes["query"], int):
        return
    place = tuple(of(Axis(axis, size)) for axis, size in sizes.items())
    found = [f.node.target for x, at in _terms(root, place) for f in product_at(x, at).factors]
    words = "the sizes of its chunks are symbolic, and are read as numbers: compile it with dynamic=False"
    raise Reject(words if _aten.cat.default in found else "", root)


def _read(root: Node, order: tuple[str, ...]) -> ChunkedForm:
    sizes = dict(zip(order, shape_of(root), strict=True))
    _require_known(root, sizes)
    require(sizes["query"] > 1, "", root)
    chunked, other = _pairs_and_other(root, order, sizes)
    states = states_in(other, root)
    same = Counter(states.others) == Counter(chunked.queries)
    require(same, "the states are read by other queries than those of the pairs of tokens", root)
    left = require_carried(states.decays, chunked.chunk, chunked)
    require(left is not None, "what is read of a state does not decay within the chunk", root)
    assert left is not None
    chunked.require_gates(left, whole(-1), of(Axis("query", chunked.tokens)), "what is read of a state")
    require_alone(states, chunked)
    require_dense(root)
    tokens = by_tokens(chunked, states.start)
    nodes = calls_down_to([root], {p.node for p in tokens.operands})
    finals = _finals(states, chunked, nodes)
    nodes = nodes | {final.node for final in finals}
    _require_only_inside(nodes, {root, *(final.node for final in finals)})
    return ChunkedForm(chunked, tokens, finals, order, root, tuple(sorted(nodes)))


def _pairs_and_other(root: Node, order: tuple[str, ...], sizes: dict[str, Any]) -> tuple[Chunked, Product]:
    """The pairs of tokens, and the other term. Raises `Reject`, silent where there is nothing like it."""
    place = tuple(of(Axis(axis, sizes[axis])) for axis in order)
    given = _terms(root, place)
    require([len(shape_of(operand)) for operand, _ in given] == [len(place)] * 2, "", root)
    one, two = (product_at(operand, at) for operand, at in given)
    return _first(partial(_pairs, *both, root, sizes) for both in ((one, two), (two, one)))


def _pairs(product: Product, other: Product, root: Node, sizes: dict[str, Any]) -> tuple[Chunked, Product]:
    """The first of two terms, as sums over the keys of a chunk, and the other. Raises `Reject`."""
    of_values = [f for f in product.factors if "n" in axes_of(f.at)]
    own = [axes_of(f.at) & set(product.summed) for f in of_values]
    keys = frozenset[str]().union(*own)
    require(len(product.summed) == 2 and len(keys) == 1, "", root)
    product = product.named({x: "key" if x in keys else "m" for x in product.summed})
    groups: dict[str, list[Placed]] = {"queries": [], "keys": [], "values": [], "decays": []}
    for factor in product.factors:
        axes = axes_of(factor.at)
        kind = "values" if "n" in axes or not axes & {"m", "query"} else "decays"
        kind = ("keys" if "key" in axes else "queries") if "m" in axes else kind
        groups[kind].append(factor)
    queries, keyed, values, decays = (tuple(group) for group in groups.values())
    require(bool(queries) and bool(keyed) and bool(decays), "", root)
    weight = weight_of(decays)
    require(bool(weight.gates), "", root)
    alone = len(weight.gates) == 1 and not weight.rates and not weight.factors
    require(alone, "the pairs of tokens in a chunk decay by more than one sum of gates", root)
    where = Where(root, (sizes["query"],) * 2, root)
    require_causal(weight, where)
    gates = behind_the_key(weight.gates[0], where)
    return Chunked(queries, keyed, values, gates, sizes["chunk"], sizes["query"], root), other


def _finals(states: States, chunked: Chunked, nodes: set[Node]) -> tuple[Final, ...]:
    """Whatever reads the states besides. Raises `Reject` where it is not the state after the last chunk."""
    node, at = states.summed.node, states.summed.at
    whole_axis = [statically_known_true(size == chunked.chunks + 1) for size in shape_of(node)]
    rows = [d for d, p in enumerate(at) if p == chunked.chunk and whole_axis[d]]
    require(len(rows) == 1, "the states have no axis of chunks", chunked.root)
    axes, last = _filled(at, rows[0]), whole(chunked.chunks)
    finals, waiting = [], [user for user in node.users if user not in nodes]
    while waiting:
        user = waiting.pop()
        place = _origin_in(node, user)
        words = (
            f"the states of chunks are also used by {user.name}, which is not the state after the last one"
        )
        require(place is not None, words, node)
        assert place is not None
        if place[rows[0]].number is None and len(shape_of(user)) == len(axes):
            nodes.add(user)
            waiting.extend(user.users)
            continue
        rest = [p.only for d, p in enumerate(place) if d != rows[0] and p.number is None]
        same = equal(shape_of(user), [size for d, size in enumerate(shape_of(node)) if d != rows[0]])
        in_order = rest == [p.only for p in _frame(user) if p.number is None]
        require(place[rows[0]] == last and same and in_order, words, node)
        finals.append(Final(user, tuple(axis for axis in axes if axis != "chunk")))
    if finals:
        _require_last(states, chunked, _place(axes, node, last))
    return tuple(finals)


def _frame(node: Node) -> Place:
    return tuple(of(Axis(str(dim), size)) for dim, size in enumerate(shape_of(node)))


def _origin_in(node: Node, user: Node) -> Place | None:
    """The place in `node` that `user` reads, through views alone; None if it computes."""
    place = _frame(user)
    while user is not node:
        moved = source_of(user, place)
        if moved is None:
            return None
        user, place = moved
    return place


def _require_last(states: States, chunked: Chunked, place: Place) -> None:
    """That the last row of the states is of all chunks."""
    words = "the state after the last chunk is not summed as those before the chunks are"
    last = states_in(product_at(states.summed.node, place), chunked.root)
    same = (last.alone, last.alone_at, last.start) == (states.alone, states.alone_at, states.start)
    require(same and not last.others, words, chunked.root)
    left = require_carried(last.decays, whole(chunked.chunks), chunked)
    require(left is None, words, chunked.root)


def _filled(at: Place, row: int) -> tuple[str, ...]:
    """The axis that each dimension is; one of size 1 has no name, and gets one that is left."""
    have = ["chunk" if d == row else next(iter(axes_of(p)), "") for d, p in enumerate(at)]
    left = [x for x in ("batch", "head", "n", "m") if x not in have]
    return tuple(x or left.pop(0) for x in have)


def _place(axes: Sequence[str], node: Node, row: Sum) -> Place:
    sizes = zip(axes, shape_of(node), strict=True)
    return tuple(row if axis == "chunk" else of(Axis(axis, size)) for axis, size in sizes)


def _require_only_inside(nodes: set[Node], outputs: set[Node]) -> None:
    """That no product is kept for others: only what lays operands out may be."""
    for node in nodes - outputs:
        if node.target in MOVES or zeros_around(node) is not None or not is_floating(node):
            continue
        for user in node.users:
            require(user in nodes, f"{node.name}, in the chunks, is also used by {user.name}", node)


def write(emit: Emit, form: ChunkedForm) -> tuple[Node, ...]:
    """Emit the op: the sum, and each state after the last chunk, laid out as they were."""
    root, tokens = form.root, form.tokens
    query, key, value, decay, state = written(
        emit, tokens, dict(zip(form.order, shape_of(root), strict=True))
    )
    both = emit(ops.linear_attention, query, key, value, scale=1.0, decay=decay, state=state)
    out = emit(operator.getitem, both, 0)
    if tokens.padded:
        out = emit(_aten.constant_pad_nd.default, out, [0, 0, 0, tokens.padded])
    out = emit(_aten.view.default, out, [shape_of(root)[form.order.index(axis)] for axis in _APART])
    out = _turned(emit, out, _APART, form.order, root)
    last = emit.cast(emit(operator.getitem, both, 1), val(root).dtype) if form.finals else out
    finals = (_turned(emit, last, ("batch", "head", "m", "n"), f.axes, f.node) for f in form.finals)
    return (out, *finals)


def _turned(emit: Emit, node: Node, have: Sequence[str], wanted: Sequence[str], old: Node) -> Node:
    order = [have.index(axis) for axis in wanted]
    node = node if order == sorted(order) else emit(_aten.permute.default, node, order)
    return laid_out_as(emit, node, old)
