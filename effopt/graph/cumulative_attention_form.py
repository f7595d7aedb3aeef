"""Linear attention as a cumulative sum of states, as it was read from a match, and the op written for it."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import Node

from effopt.graph import ops
from effopt.graph.analyses.outer_products import Labelled, contraction, outer_product
from effopt.graph.rewrite import Emit, Match, require
from effopt.graph.values import is_floating, val

_aten = torch.ops.aten


@dataclass(frozen=True)
class CumulativeForm:
    """What one match means, by letters: `lead` are those of batch entries and heads, at most two."""

    query: Labelled
    key: Labelled
    value: Labelled
    lead: str
    time: str
    out: str


def read(m: Match) -> CumulativeForm:
    """The linear attention that a match computes. Raises `Reject`."""
    one, other, letters = outer_product(m.products)
    time = letters[int(m.dim) % len(letters)]
    require(
        time in one.letters and time in other.letters, "the sum is taken over a channel, not time", m.states
    )
    query, out = contraction(m.contraction, m.root, m.states, letters, m.a)
    summed = set(letters) - set(out)
    require(time in out, "the contraction sums over the time, not over a channel", m.root)
    require(len(summed) == 1, "the states are not contracted over one channel", m.root)
    shared = [x for x in out if x in one.letters and x in other.letters]
    key, value = (one, other) if summed <= set(one.letters) else (other, one)
    free = set(out) - set(shared)
    lead = "".join(x for x in shared if x != time)
    require(
        len(lead) <= 2,
        f"there are {len(lead)} dimensions beside time and channels, at most 2 are known",
        m.root,
    )
    for x, own in ((key, summed), (value, free), (query, summed)):
        x.require(set(shared) | own, m.root)
        require(is_floating(x.node) and val(x.node).dtype == val(m.root).dtype, "the dtypes differ", x.node)
    require(len(free) == 1, f"the values have {len(free)} channel dimensions, and one is known", m.root)
    channel = summed.pop()
    return CumulativeForm(query.of(channel), key.of(channel), value.of(free.pop()), lead, time, out)


def write(emit: Emit, form: CumulativeForm) -> Node:
    """Emit the canonical op and what brings its operands and result to shape."""
    query, key, value = (_laid_out(emit, x, form) for x in (form.query, form.key, form.value))
    both = emit(ops.linear_attention, query, key, value, scale=1.0)
    out = emit(operator.getitem, both, 0)
    have = form.lead + form.time + form.value.own
    for _ in range(2 - len(form.lead)):
        out = emit(_aten.squeeze.dim, out, 0)
    return out if have == form.out else emit(_aten.permute.default, out, [have.index(x) for x in form.out])


def _laid_out(emit: Emit, x: Labelled, form: CumulativeForm) -> Node:
    wanted = form.lead + form.time + x.own
    order = [x.letters.index(letter) for letter in wanted]
    node = x.node if order == sorted(order) else emit(_aten.permute.default, x.node, order)
    for _ in range(2 - len(form.lead)):
        node = emit(_aten.unsqueeze.default, node, 0)
    return node
