"""Which cuts of a residual stream are borders of layers.

Two sources: modules, numbered in a container (`h.0`, `h.1`), and, where there are none, the smallest
period of what lies between cuts. A source only chooses among cuts that `stream.py` has proved.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from effopt.graph.analyses.stream import Ancestry, is_residual, same_form
from effopt.graph.normalize import is_view
from effopt.graph.printing import type_of
from effopt.graph.provenance import clean_path, layer_of
from effopt.graph.values import val

_NUMBER = re.compile(r"\d+")
_aten = torch.ops.aten


@dataclass(frozen=True)
class Span:
    """What lies between two cuts, neighbouring or not."""

    path: str
    """The module that it is; empty if no module is."""
    entry: Node
    exit: Node
    nodes: tuple[Node, ...]
    """Computed from `entry` on the way to `exit`, which is the last of them."""


Chain = list[Span]
"""Spans on each other: `chain[i].exit` is `chain[i + 1].entry`."""
Numbers = Mapping[Node, Mapping[str, str]]
"""For each node the containers that it is in, the outermost first, and the number of its module there."""
Refusals = list[tuple[Node, str]]


def numbers_of(nodes: Iterable[Node]) -> Numbers:
    """Numbered parts of module paths: `h.3.mlp.0` is number 3 of `h` and number 0 of `h.3.mlp`."""
    found = {}
    for node in nodes:
        parts = layer_of(node).split(".")
        numbered = {".".join(parts[:i]): p for i, p in enumerate(parts) if _NUMBER.fullmatch(p)}
        if numbered:
            found[node] = numbered
    return found


def join(spans: Sequence[Span], path: str = "") -> Span:
    """Spans on each other as one."""
    return Span(path, spans[0].entry, spans[-1].exit, tuple(n for s in spans for n in s.nodes))


def chains_of_modules(
    segments: Sequence[Span], numbers: Numbers, ancestry: Ancestry
) -> tuple[list[Chain], Refusals]:
    """Stacks whose layers are the modules of one container, the outermost container that is one.

    Args:
        segments: what lies between the neighbouring cuts of one stream.
        numbers: see `numbers_of`.
        ancestry: of the graph.
    """
    chains: list[Chain] = []
    refused: dict[str, Refusals] = {}
    met = dict.fromkeys(c for s in segments for n in s.nodes for c in numbers.get(n, ()))
    for container in sorted(met, key=lambda c: len(c.split("."))):
        if any(_is_within(container, span.path) for chain in chains for span in chain):
            continue
        mine = {numbers[n][container] for s in segments for n in s.nodes if container in numbers.get(n, ())}
        if len(mine) < 2:
            continue
        found, refused[container] = _chains_of(container, segments, numbers, ancestry)
        chains += [chain for chain in found if not _are_parts_of_one_layer(chain)]
    told = [c for c in refused if not any(_is_within(c, o) for o in refused if o != c and refused[o])]
    taken = {span.path.rpartition(".")[0] for chain in chains for span in chain}
    return chains, [
        w for c in told if c in taken or not any(_is_within(t, c) for t in taken) for w in refused[c]
    ]


def _is_within(inner: str, outer: str) -> bool:
    return not outer or inner == outer or inner.startswith(outer + ".")


def _chains_of(
    container: str, segments: Sequence[Span], numbers: Numbers, ancestry: Ancestry
) -> tuple[list[Chain], Refusals]:
    prefix = f"{container}." if container else ""
    chains: list[Chain] = [[]]
    refused: Refusals = []
    met: set[str] = set()
    for number, group in itertools.groupby(segments, key=lambda s: _number(s, container, numbers)):
        run = list(group)
        if number is None:
            found = {numbers.get(n, {}).get(container) for s in run for n in s.nodes} - {None}
            if len(found) > 1:
                refused.append(_why_not_apart(prefix, run, container, numbers, ancestry))
            continue
        if number in met:  # one module called in several places: its path names no layer
            return [], []
        met.add(number)
        span = join(run, prefix + number)
        if numbers.get(span.entry, {}).get(container) == number:
            reason: str | None = f"{span.path} does not carry on what it reads: it cannot be left out"
        else:
            reason = _why_no_layer(span, ancestry)
        if reason is not None:
            refused.append((span.exit, reason))
        elif chains[-1] and chains[-1][-1].exit is span.entry:
            chains[-1].append(span)
        else:
            chains.append([span])
    return [c for c in chains if len(c) > 1], refused


def _number(segment: Span, container: str, numbers: Numbers) -> str | None:
    """The number of the only module of `container` in a segment, if its exit belongs to that module."""
    own = numbers.get(segment.exit, {}).get(container)
    other = any(numbers.get(n, {}).get(container, own) != own for n in segment.nodes)
    return None if other else own


def _why_no_layer(span: Span, ancestry: Ancestry) -> str | None:
    entry, exit_ = val(span.entry), val(span.exit)
    if not same_form(span.entry, span.exit) or (entry.dtype, entry.device) != (exit_.dtype, exit_.device):
        return f"{span.path} reads {type_of(entry)} and gives {type_of(exit_)}: it cannot be left out"
    if not any(is_residual(node, span.entry, ancestry) for node in span.nodes):
        return f"no residual joins what {span.path} reads and what it gives: it cannot be left out"
    return None


def _why_not_apart(
    prefix: str, run: Sequence[Span], container: str, numbers: Numbers, ancestry: Ancestry
) -> tuple[Node, str]:
    """Which value keeps a graph from being cut between two modules."""
    end = run[-1].exit
    for node in (n for s in run for n in s.nodes if same_form(n, end)):
        own = numbers.get(node, {}).get(container)
        if own is None:
            continue
        readers = {
            prefix + number if (number := numbers.get(u, {}).get(container)) else u.name: None
            for u in sorted(node.users, key=ancestry.position.__getitem__)
            if ancestry.depends(end, u)
        }
        readers.pop(prefix + own, None)
        if len(readers) > 1:
            return node, f"what {prefix}{own} gives is read by {' and '.join(readers)}: they are no chain"
    first = next(n for s in run for n in s.nodes if container in numbers.get(n, {}))
    return first, f"the modules of {container or 'the model'} pass on more than one value: they are no chain"


def _are_parts_of_one_layer(chain: Chain) -> bool:
    """Whether no two modules are of one class: attention and feed-forward in a list, parts of one layer."""
    kinds = [_class_of(span) for span in chain]
    return len(set(kinds)) == len(kinds)


def _class_of(span: Span) -> str:
    for node in span.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            if clean_path(str(path)) == span.path:
                return str(kind)
    return ""


def chains_by_period(segments: Sequence[Span], ancestry: Ancestry) -> list[Chain]:
    """Stacks of layers that are equal in the parameters they read, found by the smallest period.

    A cut inside a layer, such as the sum before a norm that follows it, has one reader; a border has
    two at least, the residual and the layer. Only the last border may have one.
    """
    steps, tails = _steps(segments, ancestry)
    chains = []
    waiting = [(steps, tails)]
    while waiting:
        steps, tails = waiting.pop()
        best: tuple[int, int, int, int, list[Span]] = (0, 0, 0, 0, [])
        for row in [steps, *([*steps, tail] for tail in tails)]:
            covered, count, start, period = _best_period([_kind(s, ancestry) for s in row])
            best = max(best, (covered, count, -start, period, row), key=lambda b: b[:3])
        covered, count, start, period, row = best[0], best[1], -best[2], best[3], best[4]
        if not covered:
            continue
        starts = range(start, start + covered, period)
        chains.append([join(row[at : at + period]) for at in starts])
        waiting += [
            (row[:start], []),
            (steps[start + covered :], tails if covered + start < len(row) else []),
        ]
    return chains


def _steps(segments: Sequence[Span], ancestry: Ancestry) -> tuple[list[Span], list[Span]]:
    """The segments joined from border to border, and the ways in which a last one can end."""
    end = segments[-1].exit
    borders = [
        i for i, s in enumerate(segments) if sum(ancestry.depends(end, user) for user in s.entry.users) > 1
    ]
    if not borders:
        return [], []
    steps = [join(segments[a:b]) for a, b in itertools.pairwise(borders)]
    return steps, [join(segments[borders[-1] : to]) for to in range(borders[-1] + 1, len(segments) + 1)]


def _kind(span: Span, ancestry: Ancestry) -> object:
    """What equal steps of a stack share; each step that is no layer differs from all others."""
    return span if _why_no_layer(span, ancestry) is not None else _make_of(span)


def _best_period(kinds: Sequence[object]) -> tuple[int, int, int, int]:
    """(steps covered, repeats, first step, period) of the longest repetition, by the shortest period."""
    best = (0, 0, 0, 0)
    for period in range(1, len(kinds) // 2 + 1):
        equal = [kinds[i] == kinds[i + period] for i in range(len(kinds) - period)]
        at = 0
        for is_equal, group in itertools.groupby(equal):
            length = len(list(group))
            count = length // period + 1
            if is_equal and count > 1 and (count * period, count) > best[:2]:
                best = (count * period, count, at, period)
            at += length
    return best


def _make_of(span: Span) -> frozenset[tuple[object, int]]:
    """What a span calls, and the shapes of what it reads of the graph's inputs, each with how often."""
    inside = {span.entry, *span.nodes}
    outside = dict.fromkeys(a for n in span.nodes for a in n.all_input_nodes if a not in inside)
    found: Counter[object] = Counter(n.target for n in span.nodes)
    found.update(type_of(val(a)) for a in outside if _is_of_input(a))
    return frozenset(found.items())


def _is_of_input(node: Node) -> bool:
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        takes_apart = node.target in (operator.getitem, _aten._to_copy.default, _aten.unbind.int)
        if not takes_apart and not is_view(node):
            return False
        node = node.all_input_nodes[0]
    return node.op in ("placeholder", "get_attr")
