"""Keys, or values, that are gathered from the pages of a pool by a table.

    pages[table]  [b, n, page, hkv, d]  ->  reshape, permute, repeat  ->  [b, h, s, d]

Where an element is read from is followed through the views, so that every layout of the pool and every way to
lay out what was gathered is one case: element (batch, head, key, dim) must be the pool's at page
`table[batch, key // page]`, slot `key % page`, KV head `head // group`. Single tokens are pages of 1.

Source: Kwon et al. 2023, arXiv:2309.06180, section 4.1 (the block table). Looks only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph import ops
from effopt.graph.analyses.masks.conditions import axes_of
from effopt.graph.analyses.masks.moves import MOVES, Place, source_of
from effopt.graph.analyses.masks.reading import covers
from effopt.graph.analyses.masks.sums import Axis, Sum, divided, of
from effopt.graph.dataflow import calls_of
from effopt.graph.normalize import view_base, view_root
from effopt.graph.ops.base import bind_schema
from effopt.graph.rewrite import require
from effopt.graph.values import shape_of, val

_aten = torch.ops.aten
_GATHERS = {
    _aten.index.Tensor,
    _aten.index_select.default,
    _aten.embedding.default,
    _aten.gather.default,
    _aten.take_along_dim.default,
}
_READERS = {*MOVES, _aten.unbind.int, ops.attention.overload}
_WRITES = {
    *(_aten.index_put.default, _aten.index_copy.default, _aten.index_add.default, _aten.copy.default),
    *(_aten.slice_scatter.default, _aten.select_scatter.default, _aten.scatter.src, _aten.scatter.value),
    *(_aten.masked_scatter.default, _aten.masked_fill.Scalar, _aten.masked_fill.Tensor),
}


@dataclass(frozen=True)
class Pool:
    """Pages as they lie: what the dimensions of a node are, axes by name or one index."""

    node: Node
    at: Place
    """Axes `pages`, `head`, `slot` and `dim`; one of length 1 may not be there."""
    count: Any
    """Pages in it."""
    hkv: int
    page: int
    """Tokens of one page."""


@dataclass(frozen=True)
class Table:
    """In which page the keys of a request lie."""

    node: Node
    at: Place
    """Axes `batch` and `column`; none: it is flat, request by request."""
    columns: Any = field(compare=False)
    """Pages of a request."""


@dataclass(frozen=True)
class Gathered:
    """Where keys, or values, come from."""

    pool: Pool
    table: Table
    wraps: bool
    """Whether a page below 0 is one from the end, as for `pages[table]`; else it is an error."""
    between: tuple[Node, ...]
    """The nodes from the keys back to the gather."""


def gathers(graph: Graph) -> bool:
    """Whether a graph may hold gathered pages: to be asked ahead of a look at each attention.

    Rows of an embedding that only a norm or a sum reads, such as those of tokens, are none.
    """
    return any(
        len(shape_of(node.args[0])) > 2 or any(user.target in _READERS for user in node.users)
        for node in calls_of(graph, _GATHERS)
    )


def gathered(node: Node, name: str) -> Gathered | None:
    """What `node` `[b, h, s, d]` is gathered from; None if nothing is gathered. Raises `Reject` otherwise.

    Args:
        node: the keys, or the values.
        name: what the reasons call them.
    """
    sizes = shape_of(node)
    place: Place = tuple(
        of(Axis(n, size)) for n, size in zip(("batch", "head", "key", "dim"), sizes, strict=True)
    )
    between = [node]
    while (moved := source_of(between[-1], place)) is not None:
        between.append(moved[0])
        place = moved[1]
    gather = between[-1]
    if gather.target not in _GATHERS:
        changed = gather.op == "call_function" and any(map(_leads_to_gather, gather.all_input_nodes))
        symbolic = ", of symbolic sizes," if any(type(n) is not int for n in shape_of(gather)) else ""
        way = f"{gather.name} ({gather.target}){symbolic} is between the {name} and what is gathered"
        require(not changed, f"{way}: only views and repeated heads are followed", gather)
        return None
    found = _picked(gather, place)
    require(found is not None, f"the {name} are gathered by several tensors, or not by whole numbers", gather)
    source, dim, index, own, rest = found  # type: ignore[misc]
    at = (*rest[:dim], of(Axis("pages", shape_of(source)[dim])), *rest[dim:])
    pool = _pool(source, at, sizes, name)
    table = _table(index, own, sizes, pool.page, name)
    return Gathered(pool, table, gather.target is _aten.index.Tensor, tuple(between))


def _leads_to_gather(node: Node) -> bool:
    """Whether a node is gathered from pages, or computed of such a node and of no other tensor."""
    while node.target not in _GATHERS:
        tensors = [n for n in node.all_input_nodes if isinstance(val(n), torch.Tensor)]
        if len(tensors) != 1:
            return False
        (node,) = tensors
    return len(shape_of(node.args[0])) > 2


def _picked(node: Node, place: Place) -> tuple[Node, int, Node, Place, Place] | None:
    """(pool, dimension, indices, place in them, place in the other dimensions) of one gather."""
    source, *given = bind_schema(node.target, node.args, node.kwargs).values()  # type: ignore[arg-type]
    fits = True
    if node.target is _aten.index.Tensor:
        (dim, index), *more = ((i, x) for i, x in enumerate(given[0]) if x is not None)
        end, fits = dim + len(shape_of(index)), not more
        own, rest = place[dim:end], (*place[:dim], *place[end:])
    elif node.target is _aten.embedding.default:
        dim, index, own, rest = 0, given[0], place[:-1], place[-1:]
    else:
        dim, index = given[1::-1] if node.target is _aten.take_along_dim.default else given[:2]
        if dim is None:
            return None
        dim = int(dim) % len(place)
        own, rest = place, (*place[:dim], *place[dim + 1 :])
        if node.target is _aten.index_select.default:
            own = place[dim : dim + 1]
        else:
            fits = _are_alike(source, index, dim)
    return (
        (source, dim, index, own, rest) if fits and val(index).dtype in (torch.int32, torch.int64) else None
    )


def _are_alike(one: Node, other: Node, but: int) -> bool:
    sizes = [x[:but] + x[but + 1 :] for x in (shape_of(one), shape_of(other))]
    return len(sizes[0]) == len(sizes[1]) and all(
        statically_known_true(a == b) for a, b in zip(*sizes, strict=True)
    )


def _pool(source: Node, at: Place, sizes: tuple[Any, ...], name: str) -> Pool:
    first = source
    while (found := _pool_at(source, at, sizes)) is None:
        moved = source_of(source, at)
        lies = f"pages of {first.name} and slots in them are not key // page and key % page of the {name}"
        require(moved is not None, f"{lies}: what is gathered is laid out in another order", first)
        source, at = moved  # type: ignore[misc]
    return found


def _pool_at(source: Node, at: Place, sizes: tuple[Any, ...]) -> Pool | None:
    """The pool, if each dimension is one of pages, slots, KV heads and channels, or one index."""
    free = {frozenset({"key"}): "slot", **{frozenset({n}): n for n in ("pages", "head", "dim")}}
    counts: dict[str, Any] = dict.fromkeys(free.values(), 1)
    laid: list[Sum] = []
    for size, sum_ in zip(shape_of(source), at, strict=True):
        name = free.pop(axes_of(sum_), None)
        if name is None and sum_.number is None:
            return None
        laid.append(sum_ if name is None else of(Axis(name, size)))
        counts |= {} if name is None else {name: size}
    page, hkv, h = counts["slot"], counts["head"], sizes[1]
    if not all(type(n) is int and n > 0 for n in (page, hkv, h)) or h % hkv:
        return None
    key = of(Axis("key", sizes[2]))
    wanted = {
        "pages": of(Axis("pages", counts["pages"])),
        "slot": key - divided(key, page) * page,
        "head": divided(of(Axis("head", h)), h // hkv),
        "dim": of(Axis("dim", counts["dim"])),
    }
    names = [getattr(sum_.only, "name", "") for sum_ in laid]
    is_it = all(sum_ == wanted[n] for n, sum_ in zip(names, at, strict=True) if n)
    is_it = is_it and statically_known_true(counts["dim"] == sizes[3])
    return Pool(source, tuple(laid), counts["pages"], hkv, page) if is_it else None


def _table(index: Node, at: Place, sizes: tuple[Any, ...], page: int, name: str) -> Table:
    """The table; of its forms, best one that has two dimensions and no more columns than the keys need."""
    first = index
    found: Table | None = None
    while True:
        table = _table_at(index, at, sizes, page)
        is_narrow = table is not None and statically_known_true((table.columns - 1) * page < sizes[2])
        if table is not None and table.at and is_narrow:
            return table
        found = found or table
        moved = source_of(index, at)
        if moved is None:
            break
        index, at = moved
    says = f"{first.name} does not say, at [request, key // {page}], in which page a key of the {name} lies"
    require(found is not None, says, first)
    return found  # type: ignore[return-value]


def _table_at(index: Node, at: Place, sizes: tuple[Any, ...], page: int) -> Table | None:
    batch, column = of(Axis("batch", sizes[0])), divided(of(Axis("key", sizes[2])), page)
    own = shape_of(index)
    if len(own) == 1 and all(type(n) is int and n for n in (sizes[0], *own)):
        columns: Any = own[0] // sizes[0]
        if at[0] == batch * columns + column and own[0] == columns * sizes[0]:
            return Table(index, (), columns)
    laid: list[Sum] = []
    columns = 1 if column.number is not None else None
    for size, sum_ in zip(own, at, strict=True):
        if sum_.number is None and sum_ == column and columns is None:
            columns = size
            laid.append(of(Axis("column", size)))
        elif sum_.number is not None or sum_ == batch:
            laid.append(sum_)
        else:
            return None
    is_laid = columns is not None and covers(index, tuple(laid))
    return Table(index, tuple(laid), columns) if is_laid else None


def written_before(pages: Node, reader: Node) -> Node | None:
    """What writes, ahead of `reader`, into the pool of which `pages` is a view as it was before."""
    waiting = [view_root(pages)]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if user.target in _WRITES and user.args[0] is node and user < reader:
                return user
            is_view = view_base(user) is not None or user.target is _aten.unbind.int
            if is_view and user not in seen:
                seen.add(user)
                waiting.append(user)
    return None
