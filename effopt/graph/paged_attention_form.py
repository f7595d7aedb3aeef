"""Attention over keys that are gathered from pages, as it was read, and the one op that is written for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph import ops
from effopt.graph.analyses import masks
from effopt.graph.analyses.gathered_pages import Gathered, Table, gathered, written_before
from effopt.graph.analyses.masks.conditions import Origin, axes_of
from effopt.graph.analyses.masks.reading import covers
from effopt.graph.analyses.masks.sums import Element, Sum, Symbol, of, whole
from effopt.graph.mask_sums import bound_of, laid_out
from effopt.graph.rewrite import Emit, Match, require
from effopt.graph.values import shape_of, val

_aten = torch.ops.aten
_FAR = 1 << 40
"""No request is as long, and no sum of a few numbers below this wraps."""


@dataclass(frozen=True)
class PagedForm:
    """What one attention means."""

    keys: Gathered
    values: Gathered
    limits: tuple[Sum | Origin, ...]
    """Keys of a request: the least of these. A sum over the batch, or a mask `[batch, key]` to be counted."""
    most: int
    """Keys that a request has at most, where fewer are kept than the table has room for."""
    restores_nan: bool
    """Whether a row that sees no key gives NaN."""


def read(m: Match) -> PagedForm:
    """The attention over pages that a match computes. Raises `Reject`."""
    require(len(shape_of(m.q)) == len(shape_of(m.k)) == len(shape_of(m.v)) == 4, "", m.root)
    keys, values = gathered(m.k, "keys"), gathered(m.v, "values")
    require(keys is not None or values is not None, "", m.root)
    for found, node, name in ((keys, m.k, "keys"), (values, m.v, "values")):
        require(found is not None, f"only one of keys and values is gathered: the {name} are not", node)
    assert keys is not None
    assert values is not None
    _agree(m, keys, values)
    _stand_alone(m, keys, values)
    limits, form = _limits(m)
    s, room = shape_of(m.k)[-2], keys.table.columns * keys.pool.page
    is_whole = statically_known_true(room == s)
    cut = f"keys are cut off at {s} of the {room} that the table has room for: cut the table instead"
    require(is_whole or (_is_step(m) and type(s) is int), cut, m.k)
    return PagedForm(keys, values, limits, _FAR if is_whole else s, _restores_nan(m, form))


def _is_step(m: Match) -> bool:
    return statically_known_true(shape_of(m.q)[-2] == 1)


def _agree(m: Match, keys: Gathered, values: Gathered) -> None:
    """What the op asks of its operands."""
    shapes = [(x.count, x.hkv, x.page) for x in (keys.pool, values.pool)]
    alike = all(statically_known_true(a == b) for a, b in zip(*shapes, strict=True))
    require(alike, f"pools of keys and values have (pages, heads, page) {shapes[0]} and {shapes[1]}", m.root)
    differ = f"keys are gathered by {keys.table.node.name}, values by {values.table.node.name}"
    require(keys.table == values.table, f"{differ}: one table serves both in the op", m.root)
    dtypes = {str(val(x).dtype) for x in (m.q, keys.pool.node, values.pool.node)}
    require(len(dtypes) == 1, f"query and pages are {' and '.join(sorted(dtypes))}", m.root)
    devices = {str(val(x).device) for x in (m.q, keys.pool.node, keys.table.node)}
    require(len(devices) == 1, f"query, pages and table are on {' and '.join(sorted(devices))}", m.root)
    empty = any(statically_known_true(n == 0) for n in (*shapes[0], keys.table.columns))
    require(not empty, "the pool or the table is empty", m.root)


def _stand_alone(m: Match, keys: Gathered, values: Gathered) -> None:
    """Nothing else reads what is gathered, and the pool is still as it was when it was gathered."""
    between = {*keys.between, *values.between}
    between |= {a for n in between for a in n.all_input_nodes if a.target is _aten.unbind.int}
    for node in between:
        # Of a symbolic size nothing is left where the mask goes.
        readers = [u for u in node.users if u.target is not _aten.sym_size.int]
        others = [u.name for u in readers if u not in between and u is not m.root]
        require(not others, f"what is gathered is also read by {', '.join(others)}, and so made anyway", node)
    for pages in (keys.pool.node, values.pool.node):
        writer = written_before(pages, m.root)
        late = f"{writer and writer.name} writes into the pages after they are gathered"
        require(writer is None, f"{late}: the pool would have to be copied; write before gathering", pages)


def _limits(m: Match) -> tuple[tuple[Sum | Origin, ...], masks.Form | None]:
    """How many keys each request has, and the form of the mask if there is one."""
    told = any(x is not None for x in (m.low, m.high, m.query_ids, m.anchors, m.prefix, m.sinks))
    require(not told and not m.dropout_p, "a band, ids, sinks or dropout: the op over pages has none", m.root)
    require(m.mask is None or m.bias is None, "a mask and a bias: the op over pages has no bias", m.root)
    operand = m.bias if m.mask is None else m.mask
    require(operand is None or not m.is_causal, "causal from the first key, and a mask", m.root)
    later = "queries see keys after their own, and over pages they are the last of a request, and causal"
    if operand is None:
        require(m.is_causal or _is_step(m), later, m.root)
        return (_rows(m) if m.is_causal else whole(_FAR),), None
    form = masks.opening(operand)
    adds = f"the bias {operand.name} is not proved to hide keys and do nothing else: {_WRITE}"
    require(form is not None, adds, operand)
    assert form is not None
    require(not form.closed, "the mask hides every key", operand)
    lengths = [x for x in form.terms if isinstance(x, masks.Length)]
    proved = f"the mask {operand.name} is not proved to hide just the keys beyond a length of each request"
    others = [x for x in form.terms if not isinstance(x, (masks.Length, masks.Band))]
    require(not others, f"{proved}: {_WRITE}", operand)
    require(
        form.band.low is None, "the mask is a window: over pages a query sees from the first key", operand
    )
    if _is_step(m):
        return tuple(_limit(x.limit, x.origin, m) for x in lengths) or (whole(_FAR),), form
    require(form.band.high is not None, later, operand)
    assert form.band.high is not None
    limit = form.band.high + _rows(m)
    beyond = [(x.limit - limit).number for x in lengths]
    two = "the mask hides keys beyond one length, and has the last query at another"
    require(all(n is not None and n >= 0 for n in beyond), two, operand)
    return (_limit(limit, None, m),), form


_WRITE = "write it in the graph, as arange(keys) < lengths[:, None]"


def _rows(m: Match) -> Sum:
    """The number of queries; if it is a symbol, with the query to compute it from."""
    t = shape_of(m.q)[-2]
    return whole(t) if isinstance(t, int) else of(Symbol(str(t.node.expr), m.q))


def _limit(limit: Sum, origin: Origin | None, m: Match) -> Sum | Origin:
    heads = "a length differs between heads: the mask wants to be [batch, 1, queries, keys]"
    require("head" not in axes_of(limit), heads, m.root)
    atoms = [atom for atom, _ in limit.terms]
    if all(isinstance(a, Symbol) or _is_of(a, {"batch"}, m) for a in atoms):
        return limit
    counted = origin is not None and _is_of(origin, {"batch", "key"}, m)
    require(counted, "the length of a request is not an element of a tensor, by requests", m.root)
    assert origin is not None
    return origin


def _is_of(x: Any, names: set[str], m: Match) -> bool:
    """Whether an element, or a condition, can be laid out along these axes, on the device of the query."""
    if not isinstance(x, (Element, Origin)) or val(x.node).device != val(m.q).device:
        return False
    fits = all(s.number is not None or getattr(s.only, "name", "") in names for s in x.at)
    return fits and covers(x.node, x.at)


def _restores_nan(m: Match, form: masks.Form | None) -> bool:
    """Whether rows that see no key, if there can be any, are NaN; the op gives 0. Raises `Reject`."""
    if form is None:
        return False
    if m.mask is not None:
        fill = -math.inf if m.fill is None else m.fill
    else:
        fill = max(h.fill for h in masks.bias_of(m.bias).hidden)
    near = f"masked scores become {fill:g}, which is not far below every score; fill with -inf"
    require(fill <= masks.MASKED, near, m.root)
    if not form.terms or m.rows_see_key or masks.sees_key(form, shape_of(m.q)[-2], shape_of(m.k)[-2]):
        return False
    blind = f"a request without keys gives a mean of values beside {fill:g}, and gives 0 over pages"
    require(fill == -math.inf, f"{blind}; fill with -inf, or use scaled_dot_product_attention", m.root)
    return not m.zero_masked_rows


def write(emit: Emit, m: Match, form: PagedForm) -> Node:
    """Emit the op and what brings its operands to shape."""
    pools = [
        laid_out(emit, x.pool.node, x.pool.at, ("pages", "head", "slot", "dim"))
        for x in (form.keys, form.values)
    ]
    b, t, count = _size(emit, m.q, 0), _size(emit, m.q, 2), _size(emit, pools[0], 0)
    table = _for_all(emit, _table(emit, form.keys.table, b), b, [b, -1])
    if form.keys.wraps or form.values.wraps:
        from_end = emit(_aten.add.Tensor, table, count)
        table = emit(_aten.where.self, emit(_aten.lt.Scalar, table, 0), from_end, table)
    lengths = _lengths(emit, m, form, b)
    softcap = {"softcap": m.softcap} if m.softcap else {}
    out = emit(ops.paged_attention, m.q, *pools, table, lengths, scale=m.scale, **softcap)
    emit.note = f"pages of {form.keys.pool.page}"
    if not form.restores_nan:
        return out
    rows = emit(_aten.arange.default, t, device=val(m.q).device)
    behind = emit(_aten.add.Tensor, emit(_aten.unsqueeze.default, lengths, 1), rows)
    sees = emit(_aten.ge.Scalar, behind, t)
    for dim in (1, 3):
        sees = emit(_aten.unsqueeze.default, sees, dim)
    return emit(_aten.where.ScalarOther, sees, out, math.nan)


def _table(emit: Emit, table: Table, b: Any) -> Node:
    if table.at:
        return laid_out(emit, table.node, table.at, ("batch", "column"))
    return emit(_aten.reshape.default, table.node, [b, table.columns])


def _size(emit: Emit, node: Node, dim: int) -> Any:
    size = shape_of(node)[dim]
    return size if isinstance(size, int) else emit(_aten.sym_size.int, node, dim)


def _for_all(emit: Emit, node: Node, b: Any, sizes: list[Any]) -> Node:
    """With a row for each request, where there is one row for all."""
    is_one = statically_known_true(shape_of(node)[0] == 1) and b != 1
    return emit(_aten.expand.default, node, sizes) if is_one else node


def _lengths(emit: Emit, m: Match, form: PagedForm, b: Any) -> Node:
    """Keys of each request, `[b]`; none is negative or so large that the arithmetic of a kernel wraps."""
    total: Node | None = None
    for limit in form.limits:
        if isinstance(limit, Origin):
            seen = laid_out(emit, limit.node, limit.at, ("batch", "key"))
            length = emit(_aten.sum.dim_IntList, seen, [-1])
        else:
            length = _summed(emit, m, limit)
        total = length if total is None else emit(_aten.minimum.default, total, length)
    assert total is not None
    most = min(form.most, torch.iinfo(val(total).dtype).max)
    return _for_all(emit, emit(_aten.clamp.default, total, 0, most), b, [b])


def _summed(emit: Emit, m: Match, limit: Sum) -> Node:
    """A sum over the batch, `[b]` or `[1]`: int64, or of the dtype of its only element."""
    sizes = [(_computed(emit, a), by) for a, by in limit.terms if isinstance(a, Symbol)]
    number = bound_of(emit, Sum(frozenset(sizes), limit.constant))
    total: Node | None = None
    for atom, by in sorted(limit.terms, key=repr):
        if not isinstance(atom, Element):
            continue
        node = laid_out(emit, atom.node, atom.at, ("batch",))
        if limit.only is None or val(node).dtype not in (torch.int32, torch.int64):
            node = emit(_aten.clamp.default, emit.cast(node, torch.int64), -_FAR, _FAR)
        node = node if by == 1 else emit(_aten.mul.Tensor, node, by)
        total = node if total is None else emit(_aten.add.Tensor, total, node)
    if total is None:
        return emit(_aten.full.default, [1], number, dtype=torch.int64, device=val(m.q).device)
    return total if number == 0 else emit(_aten.add.Tensor, total, number)


def _computed(emit: Emit, symbol: Symbol) -> Symbol:
    return replace(symbol, node=_size(emit, symbol.node, 2)) if shape_of(symbol.node) else symbol
