"""What is known of a mask or bias when compiling: whether it is causal, whether every row sees a key.

Two proofs. A mask built from positions alone (`arange` compared with `arange`, `tril`, `triu`) is read as
a band, for any sizes. A mask that depends on no input, with sizes known, is evaluated. Anything else
is unknown: None or False. Looks only.
"""

from __future__ import annotations

import math
import operator
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.constants import constant_number
from effopt.graph.values import shape_of, val

_aten = torch.ops.aten
_MOST_ELEMENTS = 1 << 22
_MOST_NODES = 64
_END = sys.maxsize
"""How `x[:]` spells the end of a slice."""
_MASKED = -1e30
"""An added number at or below this masks: it is below any sum of float32 scores that a model makes."""

_PASS = {
    *(_aten.expand.default, _aten.clone.default, _aten._to_copy.default, _aten.detach.default),
    *(_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default, _aten.unsqueeze.default),
    _aten.lift_fresh_copy.default,
}
_COMPARE = {
    _aten.le.Tensor: (operator.neg, 0),
    _aten.lt.Tensor: (operator.neg, 1),
    _aten.ge.Tensor: (operator.pos, 0),
    _aten.gt.Tensor: (operator.pos, 1),
}
_WHERE = {_aten.where.self, _aten.where.ScalarOther, _aten.where.ScalarSelf, _aten.where.Scalar}
_FILL = {_aten.masked_fill.Scalar, _aten.masked_fill.Tensor}
_BUILDS_MASK = {*_WHERE, *_FILL, _aten.tril.default, _aten.triu.default, _aten.mul.Tensor}
_AND = {_aten.bitwise_and.Tensor, _aten.logical_and.default, _aten.__and__.Tensor}
_NOT = {_aten.bitwise_not.default, _aten.logical_not.default}
_ARANGES = {_aten.arange.default, _aten.arange.start, _aten.arange.start_step}


@dataclass(frozen=True)
class Band:
    """True where `low <= key - query <= high`, indices from 0."""

    low: float = -math.inf
    high: float = math.inf

    def __and__(self, other: Band) -> Band:
        return Band(max(self.low, other.low), min(self.high, other.high))


def is_causal(mask: Node) -> bool:
    """Whether a boolean mask is True, or a bias 0, exactly where key <= query, and masks the rest."""
    band = band_of(mask)
    if band is not None:
        return band == Band(high=0)
    known = evaluate(mask)
    if known is None or known.dim() < 2:
        return False
    t, s = known.shape[-2:]
    wanted = torch.ones(t, s, dtype=torch.bool).tril().expand(known.shape)
    if known.dtype == torch.bool:
        return bool((known == wanted).all())
    return bool(((known == 0) == wanted).all() and ((known <= _MASKED) == ~wanted).all())


def every_row_sees(mask: Node) -> bool:
    """Whether no row of a mask (bool: all False; float: all -inf) is without a key."""
    if val(mask).dtype != torch.bool and lower_bound(mask) > -math.inf:
        return True
    sizes = shape_of(mask)
    band = band_of(mask) if len(sizes) > 1 else None
    if band is not None:
        first = band.low == -math.inf and band.high >= 0
        diagonal = band.low <= 0 <= band.high and statically_known_true(sizes[-2] <= sizes[-1])
        if first or diagonal:
            return True
    known = evaluate(mask)
    if known is None or known.dim() < 1:
        return False
    return bool((known if known.dtype == torch.bool else known > -math.inf).any(-1).all())


def is_mask(node: Node) -> bool:
    """Whether a mask or bias is built as masks are, or is an input; False for what is only a learned bias."""
    while val(node).dtype != torch.bool and node.target in _PASS:
        node = node.all_input_nodes[0]
    given = node.op != "call_function"
    return given or val(node).dtype == torch.bool or node.target in _BUILDS_MASK


def lower_bound(node: Any, depth: int = 12) -> float:
    """A number that no element of `node` is below; -inf if none is known."""
    number = constant_number(node)
    if number is not None:
        return float(number)
    if not isinstance(node, Node) or node.op != "call_function" or depth == 0:
        return -math.inf
    args = node.args
    if node.target in _PASS:
        source = args[0]
        if isinstance(val(source), torch.Tensor) and val(source).dtype == torch.bool:
            return 0.0
        low = lower_bound(source, depth - 1)
        # A finite float32 can become -inf in a narrower type.
        kept = not val(node).dtype.is_floating_point or low >= torch.finfo(val(node).dtype).min
        return low if kept else -math.inf
    if node.target in _WHERE:
        return min(lower_bound(args[1], depth - 1), lower_bound(args[2], depth - 1))
    if node.target in _FILL:
        return min(lower_bound(args[0], depth - 1), lower_bound(args[2], depth - 1))
    return -math.inf


def band_of(node: Any, depth: int = 24) -> Band | None:
    """The band that a boolean mask is, or that a bias of 0 and masking numbers leaves open; else None."""
    if not isinstance(node, Node) or node.op != "call_function" or depth == 0:
        return None
    args = node.args
    if node.target in _COMPARE:
        return _compared(node)
    if node.target in _AND:
        a, b = band_of(args[0], depth - 1), band_of(args[1], depth - 1)
        return a & b if a is not None and b is not None else None
    if node.target in _NOT:
        return _negated(band_of(args[0], depth - 1))
    if node.target in _WHERE:
        return _chosen(band_of(args[0], depth - 1), args[1], args[2])
    if node.target in _FILL:
        return _chosen(band_of(args[1], depth - 1), args[2], args[0])
    if val(node).dtype == torch.bool and constant_number(node) == 1:
        return Band()
    if node.target in (_aten.tril.default, _aten.triu.default):
        return _triangle(node)
    if node.target in _PASS and _keeps_matrix(node):
        return band_of(args[0], depth - 1)
    return None


def _negated(band: Band | None) -> Band | None:
    if band is None or (band.low == -math.inf) == (band.high == math.inf):
        return None
    return Band(low=band.high + 1) if band.low == -math.inf else Band(high=band.low - 1)


def _chosen(band: Band | None, if_true: Any, if_false: Any) -> Band | None:
    """The open part of `where(band, if_true, if_false)`: 0 on one side, a masking number on the other."""
    yes, no = constant_number(if_true), constant_number(if_false)
    if yes is None or no is None:
        return None
    if yes == 0 and no <= _MASKED:
        return band
    return _negated(band) if no == 0 and yes <= _MASKED else None


def _triangle(node: Node) -> Band | None:
    diagonal = node.args[1] if len(node.args) > 1 else node.kwargs.get("diagonal", 0)
    number = constant_number(node.args[0])
    if not isinstance(diagonal, int) or number is None:
        return None
    lower = node.target is _aten.tril.default
    if val(node).dtype == torch.bool:
        inside = Band(high=diagonal) if lower else Band(low=diagonal)
        return inside if number == 1 else None
    masked = number <= _MASKED
    outside = Band(low=diagonal + 1) if lower else Band(high=diagonal - 1)
    return outside if masked else None


def _keeps_matrix(node: Node) -> bool:
    """Whether the last two dimensions are those of the operand, neither broadcast nor regrouped."""
    before, after = shape_of(node.args[0]), shape_of(node)
    return len(before) >= 2 and all(
        statically_known_true(a == b) for a, b in zip(before[-2:], after[-2:], strict=True)
    )


def _compared(node: Node) -> Band | None:
    """`rows + r <= columns + c` and its like, as a band."""
    sign, strict = _COMPARE[node.target]  # type: ignore[index]
    sides = [_index(a) for a in node.args[:2]]
    if sides[0] is None or sides[1] is None or {sides[0][0], sides[1][0]} != {1, 2}:
        return None
    columns_first = sides[0][0] == 1
    columns, rows = (sides[0][1], sides[1][1]) if columns_first else (sides[1][1], sides[0][1])
    # columns + c (op) rows + r: key - query (op) r - c.
    upper = (sign is operator.neg) == columns_first
    offset = rows - columns
    return Band(high=offset - strict) if upper else Band(low=offset + strict)


def _index(node: Any, depth: int = 12) -> tuple[int, int] | None:
    """(axis counted from the end, start) of a tensor that counts up along one axis; None if it is not one."""
    if not isinstance(node, Node) or node.op != "call_function" or depth == 0:
        return None
    if node.target in _ARANGES:
        start = 0 if node.target is _aten.arange.default else node.args[0]
        step = node.args[2] if node.target is _aten.arange.start_step and len(node.args) > 2 else 1
        return (1, start) if isinstance(start, int) and step == 1 else None
    if node.target in (_aten.add.Tensor, _aten.sub.Tensor, _aten.add.Scalar, _aten.sub.Scalar):
        inner, number = _index(node.args[0], depth - 1), constant_number(node.args[1])
        if (
            inner is None
            or not isinstance(number, int)
            or node.kwargs
            or len(shape_of(node)) != len(shape_of(node.args[0]))
        ):
            return None
        sign = 1 if node.target in (_aten.add.Tensor, _aten.add.Scalar) else -1
        return inner[0], inner[1] + sign * number
    whole = node.target is _aten.slice.Tensor and node.args[2:] == (0, _END)
    if not (whole or node.target in _PASS) or val(node).dtype not in (torch.int64, torch.int32):
        return None
    inner = _index(node.args[0], depth - 1)
    return None if inner is None else _moved(node, inner)


def _moved(node: Node, inner: tuple[int, int]) -> tuple[int, int] | None:
    before, after = shape_of(node.args[0]), shape_of(node)
    if node.target is _aten.unsqueeze.default:
        front = len(before) - inner[0]
        at = int(node.args[1]) % (len(before) + 1)  # type: ignore[arg-type]
        return len(after) - (front if front < at else front + 1), inner[1]
    if len(before) == len(after) and node.target not in (_aten.view.default, _aten.reshape.default):
        return inner
    places = [i for i, size in enumerate(reversed(after), 1) if not statically_known_true(size == 1)]
    return (places[0], inner[1]) if len(places) == 1 else None


def evaluate(node: Node) -> torch.Tensor | None:
    """The value of a node that depends on no input; None if it does, or if it is too large to compute."""
    order = _ancestors(node)
    if order is None:
        return None
    known: dict[Node, Any] = {}
    with torch.no_grad():
        for n in order:
            if n.op == "get_attr":
                known[n] = _literal(n)
                if known[n] is None:
                    return None
                continue
            args, kwargs = torch.fx.node.map_arg((n.args, dict(n.kwargs)), lambda a: known[a])
            kwargs = {k: torch.device("cpu") if k == "device" else v for k, v in kwargs.items()}
            known[n] = n.target(*args, **kwargs)  # type: ignore[operator]
    result = known[node]
    return result if isinstance(result, torch.Tensor) else None


def _literal(node: Node) -> torch.Tensor | None:
    held = getattr(node.graph.owning_module, str(node.target), None)
    literal = "_tensor_constant" in str(node.target) and isinstance(held, torch.Tensor)
    if not literal or isinstance(held, torch._subclasses.FakeTensor):
        return None
    return held.cpu() if isinstance(held, torch.Tensor) else None


def _ancestors(node: Node) -> list[Node] | None:
    """What `node` is computed from, in order; None if that holds an input, randomness or large tensors."""
    found: dict[Node, None] = {}
    waiting = [node]
    while waiting:
        n = waiting.pop()
        if n in found:
            continue
        if n.op not in ("call_function", "get_attr") or len(found) == _MOST_NODES or not _is_plain(n):
            return None
        found[n] = None
        waiting.extend(n.all_input_nodes)
    return sorted(found)


def _is_plain(node: Node) -> bool:
    value = val(node)
    if node.op == "get_attr":
        return True
    random = (
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.nondeterministic_seeded in node.target.tags
    )
    if random or not isinstance(node.target, torch._ops.OpOverload) or not isinstance(value, torch.Tensor):
        return False
    static = all(isinstance(s, int) for s in value.shape)
    return static and value.numel() <= _MOST_ELEMENTS
