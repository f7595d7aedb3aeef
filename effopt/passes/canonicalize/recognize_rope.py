"""Recognise rotary position embedding, in its common layouts.

    x * cos + cat(-x2, x1) * sin                        =>  rope(x, cos, sin)
    x * cos + flatten(stack(-x_odd, x_even)) * sin      =>  rope(x, cos, sin, interleaved=True)
    cat(x1 * cos - x2 * sin, x2 * cos + x1 * sin)       =>  rope(x, cat(cos, cos), cat(sin, sin))
    flatten(stack(even * cos - odd * sin, ...))         =>  rope(x, repeat(cos), ..., interleaved=True)
    cat(any of these of x[..., :r], x[..., r:])         =>  rope(x, ...)

Exact: the same products and sums. Inference and training. Traffic of `x`: 4 reads and 3 writes become
1 and 1. Source: Su et al. 2021, arXiv:2104.09864, equation 34.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph import ops
from effopt.graph.analyses.parts import Part, part_of
from effopt.graph.pattern import ANY, OpBuilder, any_of, tensor
from effopt.graph.rewrite import Emit, Match, require
from effopt.graph.values import shape_of, val
from effopt.passes.base import Example, Rewrite, Stage

_aten = torch.ops.aten
_repeat = _aten.repeat_interleave.self_int


@dataclass(frozen=True)
class RecognizeRoPE(Rewrite):
    """Every spelling of the rotation becomes `rope`."""

    name: ClassVar[str] = "recognize-rope"
    stage: ClassVar[Stage] = Stage.CANONICALIZE

    def anchors(self, pattern: Any) -> tuple[Any, ...]:
        """The negated half; spellings without one are told of by what they leave."""
        return (_aten.neg.default,)

    def pattern(self, op: OpBuilder, first: Any, second: Any, even: Any, odd: Any, cos: Any, sin: Any) -> Any:
        cos, sin, turned = tensor(cos), tensor(sin), tensor("turned")

        def products(a: Any, b: Any) -> list[Any]:
            return [op.sub(op.mul(a, cos), op.mul(b, sin)), op.add(op.mul(b, cos), op.mul(a, sin))]

        half = op.add(op.mul(op.cat([op.neg(second), first], -1), sin), op.mul(turned, cos))
        pairs = op.add(op.mul(op.view(op.stack([op.neg(odd), even], -1), ANY), sin), op.mul(turned, cos))
        half_width = op.cat(products(first, second), -1)
        pairs_width = op.view(op.stack(products(even, odd), -1), ANY)
        forms = (half, pairs, half_width, pairs_width)
        return any_of(op.cat([any_of(*forms), tensor("tail")], -1), *forms)

    def legal(self, m: Match) -> None:
        part = part_of(m.first or m.even)
        source: Any = m.turned or (part.base if part else None)
        require(source is not None, f"{m.first or m.even} is not a part of a last dimension", m.root)
        size = shape_of(source)[-1]
        require(type(size) is int and size % 2 == 0, f"the rotated size is odd or symbolic: {size}", m.root)
        half = size // 2
        wanted = (
            (m.first, Part(source, 0, half, 1)),
            (m.second, Part(source, half, size, 1)),
            (m.even, Part(source, 0, size, 2)),
            (m.odd, Part(source, 1, size, 2)),
        )
        for node, place in wanted:
            found = part_of(node) if node is not None else place
            require(found == place, f"{node} is {found or 'no part of a tensor'}, not {place}", m.root)
        width = size if m.turned else half
        for table in (m.cos, m.sin):
            is_full = bool(shape_of(table)) and statically_known_true(shape_of(table)[-1] == width)
            require(is_full, f"cos or sin is {list(shape_of(table))}, not [..., {width}]", m.root)
        if m.tail is not None:
            _require_rest(m, source, size)

    def rewrite(self, emit: Emit, m: Match) -> Any:
        part = part_of(m.first or m.even)
        x = part.base if part else m.turned
        if m.tail is not None:
            x = part_of(m.tail).base  # type: ignore[union-attr]
        x, cos, sin = (emit.cast(node, val(m.root).dtype) for node in (x, m.cos, m.sin))
        if m.even is None:
            tables = [t if m.turned else emit(_aten.cat.default, [t, t], -1) for t in (cos, sin)]
            return emit(ops.rope, x, *tables)
        tables = [t if m.turned else emit(_repeat, t, 2, -1) for t in (cos, sin)]
        return emit(ops.rope, x, *tables, interleaved=True)

    def samples(self) -> Iterable[Example]:
        x, angle = torch.randn(2, 3, 5, 16), torch.randn(5, 8)
        half, pairs = torch.cat((angle, angle), -1), angle.repeat_interleave(2, -1)
        yield Example(_rotate_half, (x, half.cos(), half.sin()))
        yield Example(_rotate_half, (x.bfloat16(), half.cos(), half.sin()))
        yield Example(_rotate_pairs, (x, pairs.cos(), pairs.sin()))
        yield Example(_half_width, (x, angle.cos(), angle.sin()))
        yield Example(_pairs_width, (x, angle.cos(), angle.sin()))
        yield Example(
            lambda x, c, s: torch.cat((_rotate_half(x[..., :8], c, s), x[..., 8:]), -1),
            (x, half[:, :8].cos(), half[:, :8].sin()),
        )

    def refusals(self) -> Iterable[Example]:
        x, t = torch.randn(2, 3, 16, 16), torch.randn(16, 16)
        given = (x, t, t + 1)
        yield Example(lambda x, c, s: _turn(x, x[..., :8], x[..., 8:], c, s), given, "not arg0_1[0:8]")
        yield Example(lambda x, c, s: _turn(x, x[..., 6:], x[..., :6], c, s), given, "not arg0_1[0:8]")
        yield Example(lambda x, c, s: _turn(x, x[..., 8:], -x[..., :8], -c, s), given, "no form")
        yield Example(lambda x, c, s: _rotate_half(x, c, s[:, :1]), given, "not [..., 16]")
        yield Example(lambda x, c, s: _turn(x + 1, x[..., 8:], x[..., :8], c, s), given, "not add[0:8]")


def _turn(x: Tensor, a: Tensor, b: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.cat((-a, b), -1) * sin


def _require_rest(m: Match, source: Node, size: int) -> None:
    """The tail is what the rotated part leaves of one tensor, or nothing of the rotated tensor itself."""
    rest, head = part_of(m.tail), part_of(source)
    is_rest = rest is not None and (rest.base is source or head == Part(rest.base, 0, size, 1))
    is_rest = is_rest and rest == Part(rest.base, size, shape_of(rest.base)[-1], 1)  # type: ignore[union-attr]
    require(is_rest, f"{m.tail} is not the rest of {source}", m.root)


def _rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return _turn(x, b, a, cos, sin)


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin


def _half_width(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., :8], x[..., 8:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _pairs_width(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (8, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
