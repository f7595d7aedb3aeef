"""The mask or bias of an attention as what the op says by numbers and ids, and what is left of it.

    mask = (key <= query) & (key > query - 8) & (document[key] == document[query]) & seen[key]
      =>   low = -7, high = 0, query_ids = key_ids = document, mask = seen

`plan` looks only; `write` emits. A condition that cannot be laid out again by itself keeps the mask whole,
beside what was recovered of it: the op takes both, and they agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses import masks
from effopt.graph.analyses.masks.conditions import Origin
from effopt.graph.analyses.masks.forms import AXES
from effopt.graph.analyses.masks.reading import covers
from effopt.graph.analyses.masks.sums import Axis, Element, Quotient, Sum, Symbol
from effopt.graph.mask_sums import bound_of, joined, numbers
from effopt.graph.rewrite import Emit, require
from effopt.graph.values import shape_of

_aten = torch.ops.aten
_KINDS: dict[type, str] = {
    masks.Length: "lengths of the keys",
    masks.Keys: "padding of the keys",
    masks.Rows: "a condition on queries",
    masks.RowLimit: "a last key for each query",
    masks.Prefix: "a prefix that all queries see",
    masks.Groups: "groups that differ between heads",
}
"""What a mask is said to be that stays a tensor."""


@dataclass
class Told:
    """What the op says by numbers and ids."""

    low: Sum | None = None
    high: Sum | None = None
    groups: masks.Groups | None = None
    anchors: Sum | None = None
    """How many of the first keys `low` and `groups` do not hide."""
    prefix: Sum | None = None
    """How many of the first keys `high` does not hide."""

    def takes(self, term: masks.Term, rank: int) -> bool:
        """Take a term if the op can say it beside what it says already."""
        parts, first = (term.otherwise, term.limit) if isinstance(term, masks.Prefix) else ((term,), None)
        bands = [p for p in parts if isinstance(p, masks.Band)]
        groups = [p for p in parts if isinstance(p, masks.Groups)]
        if len(bands) > 1 or len(groups) > 1 or len(bands) + len(groups) < len(parts):
            return False
        low, high = (getattr(bands[0], side) if bands else None for side in ("low", "high"))
        group = groups[0] if groups else None
        known = all(_is_known(s) for s in (low, high, first) if s is not None)
        known = known and (group is None or (rank == 4 and _are_numbers(group)))
        taken = ((self.low, low), (self.high, high), (self.groups, group))
        if not known or any(old is not None and new is not None for old, new in taken):
            return False
        hides_before = low is not None or group is not None
        if hides_before and (self.low is not None or self.groups is not None) and self.anchors != first:
            return False
        self.low, self.high, self.groups = self.low or low, self.high or high, self.groups or group
        self.anchors = first if hides_before else self.anchors
        self.prefix = first if high is not None else self.prefix
        return True


@dataclass(frozen=True)
class Plan:
    """What is known of the keys that each query sees, and the nodes that stay."""

    told: Told
    rest: tuple[Origin, ...]
    """Conditions that stay a mask."""
    whole: bool
    """Whether the mask stays as it is, because a condition of it cannot be laid out."""
    added: tuple[masks.Added, ...]
    """Terms that stay a bias."""
    fill: float | None
    """Of what a bias hid; None: -inf, or as it was."""
    rows_see_key: bool

    def describe(self) -> str:
        """In words, for the report."""
        found = []
        told = self.told
        low, high = told.low, told.high
        if low is not None or high is not None:
            bounds = [f"{'' if s is None else _text(s)}" for s in (low, high)]
            found.append(f"keys {bounds[0] or 'from the first'} .. {bounds[1] or 'to the last'} of the query")
        if told.groups is not None:
            n = told.groups.chunk
            found.append("documents" if n is None else f"chunks of {n}")
        for first, bound in ((told.anchors, "behind"), (told.prefix, "ahead")):
            if first is not None:
                found.append(f"the first {_text(first)} of those {bound} too")
        left = [f"the mask {o.node.name}" for o in self.rest]
        left += [f"the bias {a.node.name} ({a.kind})" for a in self.added]
        stays = f"; {', '.join(left)} stays a tensor" if left else ""
        return (", ".join(found) or "every key is open") + stays


def _text(s: Sum) -> str:
    symbols = [f"{'' if by == 1 else by}{getattr(a, 'expression', a)}" for a, by in s.terms]
    return " + ".join([*symbols, *([str(s.constant)] if s.constant or not symbols else [])])


def plan(query: Node, key: Node, mask: Node | None, bias: Node | None) -> Plan:
    """What of the mask, or of a bias if there is no mask, an attention can be told. Raises `Reject`."""
    operand = bias if mask is None else mask
    assert operand is not None
    rank = len(shape_of(query))
    require(rank <= 4, f"a mask over {rank - 2} leading dimensions is not read", operand)
    added: tuple[masks.Added, ...] = ()
    fill = None
    if mask is not None:
        form = masks.form_of(mask)
    else:
        form, added, fill = _of_bias(operand, shape_of(query)[-2], shape_of(key)[-2])
    require(not form.closed, "", operand)
    told, rest = _sorted(form, rank)
    unplaced = any(o is None or not _lies(o, rank) for o in rest)
    known = told != Told() or not (form.terms or added)
    # A bias over the keys of one query, as of a static cache: a mask says that what it hides has no weight.
    known = known or (mask is None and not unplaced and statically_known_true(shape_of(query)[-2] == 1))
    require(known or not form.terms, _reason(form), operand)
    require(known, "", operand)
    require(not unplaced or mask is not None, "what it adds besides cannot be laid out again", operand)
    sees = masks.sees_key(form, shape_of(query)[-2], shape_of(key)[-2])
    sees = sees and all(_is_finite(a.node) for a in added) and (mask is None or bias is None)
    kept = () if unplaced else tuple(o for o in rest if o is not None)
    return Plan(told, kept, unplaced, added, fill, sees)


def _of_bias(bias: Node, t: Any, s: Any) -> tuple[masks.Form, tuple[masks.Added, ...], float | None]:
    read = masks.bias_of(bias)
    kinds = ", ".join(dict.fromkeys(f"{a.node.name} ({a.kind})" for a in read.added))
    require(bool(read.hidden), f"the bias hides no key by a number: {kinds} stays a tensor", bias)
    form = masks.form_of_condition(read.open)
    fills = {h.fill for h in read.hidden}
    if fills == {-math.inf} or masks.sees_key(form, t, s):
        return form, read.added, None
    alone = len(read.hidden) == 1 and not read.added
    require(
        alone,
        f"a row may see no key, and then the sum of its biases decides: {bias.name} stays a tensor",
        bias,
    )
    return form, read.added, fills.pop()


def _reason(form: masks.Form) -> str:
    stops = form.unread()
    if stops:
        names = ", ".join(f"{n.name} ({_what(n)})" for n in stops[:3])
        return f"which keys a query sees hangs on {names}, which is not read further: it stays a tensor"
    kinds = dict.fromkeys(_KINDS.get(type(term), "bounds known at run time") for term in form.terms)
    return f"the mask is {', '.join(kinds)}, and no kernel here skips keys by that: it stays a tensor"


def _what(node: Node) -> str:
    return "an input" if node.op == "placeholder" else str(node.target).removesuffix(".default")


def _sorted(form: masks.Form, rank: int) -> tuple[Told, list[Origin | None]]:
    """What the op can be told, and the origins of all else."""
    told = Told()
    rest: list[Origin | None] = []
    for term in sorted(form.terms, key=lambda term: isinstance(term, masks.Prefix)):
        if told.takes(term, rank):
            continue
        if isinstance(term, masks.Band):
            rest.extend(term.origins or (None,))
        else:
            rest.append(term.origin)
    return told, rest


def _is_known(s: Sum) -> bool:
    return all(isinstance(atom, Symbol) for atom, _ in s.terms)


def _are_numbers(groups: masks.Groups) -> bool:
    return _is_number(groups.query, "query") and _is_number(groups.key, "key")


def _is_number(s: Sum, axis: str) -> bool:
    return bool(s.terms) and all(_is_number_atom(atom, axis) for atom, _ in s.terms)


def _is_number_atom(atom: Any, axis: str) -> bool:
    if isinstance(atom, Quotient):
        return _is_number(atom.of, axis)
    if isinstance(atom, Element):
        names = {"batch", axis}
        return covers(atom.node, atom.at) and all(
            s.number is not None or getattr(s.only, "name", "") in names for s in atom.at
        )
    return isinstance(atom, Axis) and atom.name == axis


def _lies(origin: Origin, rank: int) -> bool:
    names = AXES[4 - rank :]
    return covers(origin.node, origin.at) and all(
        s.number is not None or getattr(s.only, "name", "") in names for s in origin.at
    )


def _is_finite(node: Node) -> bool:
    known = masks.evaluate(node)
    return masks.least_number(node) > -math.inf or (known is not None and bool(known.isfinite().all()))


def write(emit: Emit, p: Plan, query: Node, key: Node, mask: Node | None) -> dict[str, Any]:
    """Emit what the attention is told: arguments of the op by name, those that change."""
    rank = len(shape_of(query))
    found: dict[str, Any] = {}
    for name in ("low", "high", "anchors", "prefix"):
        bound = getattr(p.told, name)
        if bound is not None:
            found[name] = bound_of(emit, bound)
    if p.told.groups is not None:
        found["query_ids"] = numbers(emit, p.told.groups.query, "query", query)
        found["key_ids"] = numbers(emit, p.told.groups.key, "key", key)
    if mask is not None:
        found["mask"] = mask if p.whole else joined(emit, p.rest, _aten.logical_and.default, rank)
    else:
        found["mask"] = joined(emit, p.rest, _aten.logical_and.default, rank)
        parts = [Origin(a.node, a.at) for a in p.added]
        found["bias"] = joined(emit, parts, _aten.add.Tensor, rank)
        found["fill"] = p.fill
    return found
