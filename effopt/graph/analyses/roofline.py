"""How many operations a graph makes and how many bytes it moves.

Canonical ops count themselves (`Op.flops`, `Op.bytes_moved`). ATen's products are counted from their
shapes, with the rules of `torch.utils.flop_counter` where it has one; everything else is taken as
elementwise, one operation an element of its largest operand or result. Bytes are those of one kernel
an op: every operand read once, every result written once, views free. They are thus what the graph
would move *unfused*: a backend that fuses moves less, and the difference between two graphs is what a
pass saved before any backend. Symbolic sizes count at their hints; nothing is specialised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate
from torch.utils.flop_counter import flop_registry

from effopt.graph.normalize import is_view
from effopt.graph.ops.base import Op, bind_schema, hint, tensor_bytes
from effopt.graph.values import val
from effopt.target import Target

_aten = torch.ops.aten
_MOVE_ONLY = frozenset(
    "arange cat clone constant_pad_nd contiguous copy embedding empty expand_copy full full_like gather index"
    " index_copy index_put index_select masked_scatter new_full new_ones new_zeros ones pad repeat"
    " repeat_interleave roll scalar_tensor scatter select_scatter slice_scatter stack tril triu zeros"
    " zeros_like _to_copy".split()
)


@dataclass(frozen=True)
class OpCost:
    """The calls of one op, added up."""

    calls: int = 0
    flops: float = 0.0
    bytes_moved: float = 0.0

    def __add__(self, other: OpCost) -> OpCost:
        return OpCost(
            self.calls + other.calls, self.flops + other.flops, self.bytes_moved + other.bytes_moved
        )


@dataclass(frozen=True)
class Roofline:
    """The cost of a graph, by op name (`attention`, `linear`, `mul`), views left out."""

    by_op: Mapping[str, OpCost]

    @property
    def flops(self) -> float:
        """Floating-point operations of all calls."""
        return sum(cost.flops for cost in self.by_op.values())

    @property
    def bytes_moved(self) -> float:
        """Bytes read and written if every op were one kernel."""
        return sum(cost.bytes_moved for cost in self.by_op.values())

    def seconds(self, target: Target) -> float:
        """Time at the target's rates if arithmetic and traffic took turns: an upper bound of the roofline,
        and one in which bytes count for a graph that is bound by arithmetic, and the other way round.
        """
        return self.bytes_moved / target.bytes_per_s + self.flops / target.flops_per_s


def roofline(graph: Graph, ops: Mapping[str, Op]) -> Roofline:
    """The cost of `graph`.

    Args:
        graph: nodes carry `val`; not changed.
        ops: canonical ops by name, those of plugins included.
    """
    by_overload = {op.overload: op for op in ops.values()}
    totals: dict[str, OpCost] = {}
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            name = op_name(node.target)
            cost = cost_of(node, by_overload.get(node.target))
            if cost is not None:
                totals[name] = totals.get(name, OpCost()) + cost
    return Roofline(dict(sorted(totals.items(), key=lambda item: -item[1].bytes_moved)))


def op_name(target: torch._ops.OpOverload) -> str:
    """`attention` of `effopt::attention`, `mul` of `aten::mul.Tensor`."""
    return target._schema.name.split("::")[-1]


def cost_of(node: Node, op: Op | None) -> OpCost | None:
    """The cost of one call; None if it computes and moves nothing (a view, a size)."""
    result = val(node)
    if not isinstance(result, (torch.Tensor, tuple, list)) or _is_free(node):
        return None
    args, kwargs = map_aggregate(node.args, val), map_aggregate(dict(node.kwargs), val)
    operands = bind_schema(node.target, args, kwargs)  # type: ignore[arg-type]
    if op is not None:
        return OpCost(1, op.flops(operands, result), op.bytes_moved(operands, result))
    moved = tensor_bytes(list(operands.values())) + tensor_bytes(result)
    name = op_name(node.target)  # type: ignore[arg-type]
    if name == "embedding":
        moved = 2 * tensor_bytes(result) + tensor_bytes(operands["indices"])
    return OpCost(1, _aten_flops(node.target, args, kwargs, result), moved)


def _is_free(node: Node) -> bool:
    """Views move nothing. `reshape` and its like are views of a contiguous operand, else copies."""
    if node.target is _aten._unsafe_view.default:
        return True
    if node.target is _aten.dropout.default:
        return not (node.args[2] and node.args[1])
    if not is_view(node):
        return False
    base = val(node.args[0]) if node.args else None
    if node.target in (_aten.reshape.default, _aten.contiguous.default, _aten.flatten.using_ints):
        return isinstance(base, torch.Tensor) and base.is_contiguous()
    if node.target in (_aten.to.dtype, _aten.to.device, _aten.to.other, _aten.to.dtype_layout):
        return isinstance(base, torch.Tensor) and base.dtype == val(node).dtype
    return True


def _aten_flops(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> float:
    name, operands = op_name(target), bind_schema(target, args, kwargs)
    if name in _MOVE_ONLY:
        return 0.0
    if name in _PRODUCTS:
        return _PRODUCTS[name](operands, result)
    registered = flop_registry.get(target.overloadpacket)
    if registered is not None:
        return float(hint(registered(*args, **kwargs, out_val=result)))
    tensors: list[torch.Tensor] = []
    map_aggregate(
        (*operands.values(), result), lambda v: tensors.append(v) if isinstance(v, torch.Tensor) else None
    )
    return float(max((hint(t.numel()) for t in tensors), default=0))


def _matmul(operands: Mapping[str, Any], result: Any) -> float:
    """Of the first operand's last dimension with the second's; grouped products as well."""
    first = next(iter(operands.values()))
    return 2.0 * hint(result.numel()) * hint(first.shape[-1])


def _sdpa(operands: Mapping[str, Any], result: Any) -> float:
    query, key = operands["query"], operands["key"]
    scores = hint(query.numel()) / max(hint(query.shape[-1]), 1) * hint(key.shape[-2])
    return scores * (2.0 * hint(query.shape[-1]) + 5.0 + 2.0 * hint(result.shape[-1]))


def _einsum(operands: Mapping[str, Any], result: Any) -> float:
    terms = operands["equation"].split("->")[0].replace(" ", "").split(",")
    sizes: dict[str, int] = {}
    for term, tensor in zip(terms, operands["tensors"], strict=True):
        if "." in term:
            return 2.0 * hint(result.numel())
        sizes.update(zip(term, (hint(s) for s in tensor.shape), strict=True))
    return 2.0 * math.prod(sizes.values())


def _convolution(operands: Mapping[str, Any], result: Any) -> float:
    return 2.0 * hint(result.numel()) * hint(operands["weight"][0].numel())


_PRODUCTS: dict[str, Callable[[Mapping[str, Any], Any], float]] = {
    "matmul": _matmul,
    "linear": _matmul,
    "_grouped_mm": _matmul,
    "grouped_mm_fallback": _matmul,  # a custom op of transformers, where torch has no grouped product
    "scaled_dot_product_attention": _sdpa,
    "einsum": _einsum,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "conv3d": _convolution,
    "softmax": lambda operands, result: 5.0 * hint(result.numel()),
    "layer_norm": lambda operands, result: 8.0 * hint(result.numel()),
}
