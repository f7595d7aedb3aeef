"""What a layer would read, and what it would no longer keep, if it took an earlier layer's keys and values.

The keys and values of the two must be computed alike, with other weights: same heads, same rotation, same
cache. Then whatever the later layer keeps of its own has a counterpart in the earlier one: a cache that
it returns becomes that counterpart, and a cache that it writes in place is left as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node
from torch.utils import _pytree as pytree

from effopt.graph import ops
from effopt.graph.analyses.counterparts import Differ, counterparts, has_same_form
from effopt.graph.analyses.layers import Layer, Stack, attention_of
from effopt.graph.normalize import view_root
from effopt.graph.rewrite import Reject, require
from effopt.graph.values import MUTATED, is_floating, shape_of

SCORE_TERMS = (
    "mask",
    "bias",
    "is_causal",
    "softcap",
    "low",
    "high",
    "query_ids",
    "key_ids",
    "anchors",
    "prefix",
)
"""What must be the same of two attentions over the same keys: it says which keys a query sees."""


@dataclass(frozen=True)
class Reading:
    """The edits that make a layer read an earlier layer's keys and values."""

    operands: Mapping[Node, tuple[Node, Node]]
    """Attention -> the key and value that it reads instead."""
    outputs: Mapping[int, Node]
    """Position among the graph's outputs -> what is returned there instead; for the new value of a mutated
    input, that input: it is not written."""


def reading(stack: Stack, position: int, first: int) -> Reading:
    """How a layer reads the keys and values of an earlier one of its stack.

    Raises:
        Reject: the two are not alike; nothing is changed in either case.
    """
    require(first in range(position), f"layer {position} of a stack cannot read layer {first!r}")
    later, earlier = stack.layers[position], stack.layers[first]
    pairs = list(_pairs(later, earlier))
    known: dict[Node, Node] = {later.entry: earlier.entry}
    for ours, theirs in pairs:
        for name, a, b in zip(("keys", "values"), ours.args[1:3], theirs.args[1:3], strict=True):
            try:
                known |= counterparts(a, b, known)  # type: ignore[arg-type]
            except Differ as why:
                reason = f"its {name} are not computed as those of {earlier.path}: {why}"
                raise Reject(reason, ours) from why
    del known[later.entry]
    reads = {(node, ours) for ours, _ in pairs for node in ours.args[1:3] if isinstance(node, Node)}
    kept = _only_kept(known, reads, {layer.exit for layer in stack.layers})
    operands = {ours: (theirs.args[1], theirs.args[2]) for ours, theirs in pairs}
    return Reading(operands, _outputs(kept, known, earlier))  # type: ignore[arg-type]


def _pairs(later: Layer, earlier: Layer) -> Iterator[tuple[Node, Node]]:
    """The k-th attention of one with the k-th of the other, checked."""
    ours, theirs = attention_of(later), attention_of(earlier)
    for layer, found in ((later, ours), (earlier, theirs)):
        require(bool(found), f"{layer.path} holds no attention that was recognised", layer.exit)
    counts = f"{len(ours)} attentions, {earlier.path} has {len(theirs)}"
    require(len(ours) == len(theirs), f"it has {counts}", later.exit)
    for a, b in zip(ours, theirs, strict=True):
        for name, index in (("keys", 1), ("values", 2)):
            x, y = a.args[index], b.args[index]
            shapes = f"{list(shape_of(x))}, those of {earlier.path} {list(shape_of(y))}"
            require(has_same_form(x, y), f"its {name} are {shapes}", a)  # type: ignore[arg-type]
        mine, its = (ops.attention.bind(n.args, n.kwargs) for n in (a, b))
        for term in SCORE_TERMS:
            is_same = mine[term] is its[term] or (
                not isinstance(mine[term], Node) and mine[term] == its[term]
            )
            require(is_same, f"its {term} is not that of {earlier.path}: it may see other keys", a)
        yield a, b


def _only_kept(
    computed: Iterable[Node], reads: Collection[tuple[Node, Node]], exits: Collection[Node]
) -> list[Node]:
    """Of `computed` and what follows from it, the nodes that are only there to be returned, in graph order.

    Args:
        computed: where to begin.
        reads: pairs of value and reader that do not count: they are about to be redirected.
        exits: the stream, in which everything else ends.
    """
    reached: set[Node] = set()
    waiting = list(computed)
    while waiting:
        node = waiting.pop()
        if node in reached or node in exits or node.op == "output":
            continue
        reached.add(node)
        waiting.extend(user for user in node.users if (node, user) not in reads)
    kept: list[Node] = []
    unread: set[Node] = set()
    settled: set[Node] = set()
    for node in sorted(reached, reverse=True):
        readers = [user for user in node.users if (node, user) not in reads and user not in unread]
        if not readers:
            unread.add(node)
        elif all(user.op == "output" or user in settled for user in readers):
            settled.add(node)
            kept.append(node)
    return kept[::-1]


def _outputs(kept: Sequence[Node], known: dict[Node, Node], earlier: Layer) -> dict[int, Node]:
    """What the graph returns instead of what only the later layer's own keys and values are kept in."""
    if not kept:
        return {}
    own: set[Node] = set()
    for node in kept:
        # Positions and lengths, which are whole numbers, are still counted for every layer.
        if node.op == "call_function" and is_floating(node):
            if node in known:
                own.add(node)
            elif sources := [operand for operand in node.all_input_nodes if operand in own]:
                known[node] = _counterpart(node, known[sources[0]], known, earlier)
                own.add(node)
    output = kept[0].graph.output_node()
    inputs = kept[0].graph.find_nodes(op="placeholder")
    mutated: Sequence[int] = output.meta.get(MUTATED, ())
    values: Sequence[Any] = output.args[0]  # type: ignore[assignment]
    changed = {i: known[value] for i, value in enumerate(values) if value in own}
    unwritten = {values[i] for i in changed if i < len(mutated)}
    for index in changed:
        if index < len(mutated):
            changed[index] = inputs[mutated[index]]
        else:
            is_written = view_root(values[index]) in unwritten
            require(not is_written, "it returns a cache that it also writes in place", values[index])
    return changed


def _counterpart(node: Node, source: Node, known: Mapping[Node, Node], earlier: Layer) -> Node:
    """The reader of `source` that does what `node` does."""
    wanted = _described(node, known)
    for user in source.users:
        if user.op != "output" and _described(user, {}) == wanted:
            return user
    raise Reject(f"what it keeps of its keys, {node.name}, has no counterpart in {earlier.path}", node)


def _described(node: Node, known: Mapping[Node, Node]) -> tuple[Any, ...]:
    """Target and arguments, with counterparts in place of nodes."""
    leaves, form = pytree.tree_flatten((node.args, dict(node.kwargs)))
    return node.target, form, [known.get(a, a) if isinstance(a, Node) else a for a in leaves]
