"""How query, key and value reach attention: transposes, repeated heads, factors. Looks only."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses.no_ops import stands_for
from effopt.graph.constants import constant_number
from effopt.graph.values import shape_of, val

_aten = torch.ops.aten
VIEWS = (_aten.view.default, _aten._unsafe_view.default, _aten.reshape.default)
_SWAPS = (_aten.transpose.int, _aten.permute.default, _aten.mT.default)


def equal(a: Any, b: Any) -> bool:
    """Whether two shapes are one, without guarding on symbols."""
    return len(a) == len(b) and all(statically_known_true(x == y) for x, y in zip(a, b, strict=True))


def broadcasts(sizes: Any, to: Any) -> bool:
    """Whether `sizes` broadcasts to `to` without enlarging it."""
    pairs = zip(reversed(sizes), reversed(to), strict=False)
    fits = all(statically_known_true(a == b) or statically_known_true(a == 1) for a, b in pairs)
    return len(sizes) <= len(to) and fits


def without_factor(node: Node) -> tuple[Node, float]:
    """`node` as `factor * source`, for factors that are compile-time numbers."""
    factor = 1.0
    while node.target in (_aten.mul.Tensor, _aten.div.Tensor, _aten.mul.Scalar, _aten.div.Scalar):
        a, b = node.args[0], node.args[1]
        if node.kwargs:
            break
        if node.target in (_aten.mul.Tensor, _aten.mul.Scalar) and constant_number(b) is None:
            a, b = b, a
        number = constant_number(b)
        if not number or not isinstance(a, Node) or val(a).dtype != val(node).dtype:
            break
        if len(shape_of(a)) != len(shape_of(node)):
            break
        factor *= number if node.target in (_aten.mul.Tensor, _aten.mul.Scalar) else 1.0 / number
        node = a
    return node, factor


def transposed_source(node: Node) -> Node | None:
    """What `node` is the (-2, -1) transpose of, or None."""
    source = node.args[0] if node.args else None
    if node.target not in _SWAPS or not isinstance(source, Node):
        return None
    rank = len(shape_of(node))
    order = list(range(rank))
    if node.target is _aten.transpose.int:
        i, j = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
        order[i], order[j] = order[j], order[i]
    elif node.target is _aten.permute.default:
        order = [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr, arg-type]
    else:
        order[-2:] = [rank - 1, rank - 2]
    return source if order == [*range(rank - 2), rank - 1, rank - 2] else None


def unrepeated(node: Node) -> Node:
    """`[b, hkv, s, d]` that `node` `[b, h, s, d]` repeats head by head (each in a row), or `node` itself."""
    if len(shape_of(node)) != 4:
        return node
    if node.target is _aten.repeat_interleave.self_int:
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim")
        return node.args[0] if dim in (1, -3) else node  # type: ignore[return-value]
    if node.target is _aten.expand.default:
        source, own = node.args[0], shape_of(node)
        sizes = shape_of(source)
        only_heads = len(sizes) == 4 and equal((sizes[0], *sizes[2:]), (own[0], *own[2:]))
        return source if isinstance(source, Node) and only_heads else node
    if node.target not in VIEWS:
        return node
    wide = _without_copy(node.args[0])
    if wide.target is not _aten.expand.default or len(shape_of(wide)) != 5:
        return node
    single = wide.args[0]
    while isinstance(single, Node) and (source := stands_for(single)) is not None:
        single = source  # `x[:, :, None, :, :]` slices a symbolic dimension from end to end
    sizes, result = shape_of(single), shape_of(node)
    if not (isinstance(single, Node) and len(sizes) == 5 and statically_known_true(sizes[2] == 1)):
        return node
    b, hkv, n, s, d = shape_of(wide)
    if not (equal((b, hkv * n, s, d), result) and equal((b, hkv, s, d), (*sizes[:2], *sizes[3:]))):
        return node
    return _squeezed(single) or node


def _squeezed(single: Node) -> Node | None:
    """What gained a dimension 2 of size 1 in `single`."""
    source = single.args[0]
    if single.target is _aten.unsqueeze.default and single.args[1] in (2, -3) and isinstance(source, Node):
        return source
    sizes = shape_of(single)
    is_view = single.target in VIEWS and isinstance(source, Node)
    return source if is_view and equal(shape_of(source), (*sizes[:2], *sizes[3:])) else None  # type: ignore[return-value]


def _without_copy(node: Any) -> Node:
    while isinstance(node, Node) and node.target is _aten.clone.default:
        node = node.args[0]
    return node


def before_merge(node: Node, lead: tuple[Any, ...]) -> Node | None:
    """What `node` `[n, t, d]` was before its batch and heads were merged, if that is `[*lead, t, d]`."""
    if node.target not in VIEWS:
        return None
    source = _without_copy(node.args[0])
    sizes = shape_of(node)
    return source if equal(shape_of(source), (*lead, *sizes[-2:])) else None
