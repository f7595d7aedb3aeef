"""In which ways one call can be a step of a loop over time.

    state * g + kv,   state / 2 - kv,   addcmul(kv, state, g),   addcmul(state, k, v),   baddbmm(state, k, v),
    addmm(state, k, v),   addr(state, k, v),   addcdiv(state, kv, n),   addcdiv(kv, state, n),
    lerp(state, kv, w),   sum((state * g, kv))   =>   decay * state + added

What a call computes on the way, such as the product in `baddbmm`, is an `Inner`. Looks only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from effopt.graph.analyses.no_ops import stands_for
from effopt.graph.constants import constant_number
from effopt.graph.matching import bound_arguments
from effopt.graph.values import val

_aten = torch.ops.aten
_PRODUCTS: dict[Any, Any] = {
    _aten.addcmul.default: _aten.mul.Tensor,
    _aten.baddbmm.default: _aten.bmm.default,
    _aten.addmm.default: _aten.mm.default,
    _aten.addr.default: _aten.outer.default,
}
"""A call that adds a product to its first operand -> the product."""


@dataclass(frozen=True)
class Inner:
    """A call that is made within another one: it has no node."""

    target: Any
    args: tuple[Any, ...]
    """All of them, by position."""
    like: Node
    """A node of the shape and dtype that it has, or broadcasts to."""


@dataclass(frozen=True)
class Step:
    """One way in which a call can be a step: `node = decay * previous + added`."""

    node: Node
    form: Hashable
    """Which operand is what."""
    previous: Any
    decay: Any
    """A node, an `Inner` or a number; None: nothing decays."""
    added: Any
    product: Node | None
    """The call of `decay * previous`, if it is one of its own."""
    passed: tuple[Node, ...] = ()
    """Calls that only hand on the state, or `product`: a copy, or a sum with 0."""


def steps_of(node: Node) -> Iterator[Step]:
    """Every way in which a call of one of `TARGETS` can be one step."""
    # A sum with the number 0 is none: it hands its operand on, as in `sum((state, kv))`.
    if not any(type(operand) in (int, float) and not operand for operand in node.args[:2]):
        yield from _FORMS[node.target](node)


def joined(steps: Mapping[Node, Step]) -> dict[Node, Step]:
    """Steps of one form, each of which reads the step before itself, and not what only hands that on."""
    found = dict(steps)
    for node, step in steps.items():
        whole, passed = _whole(step.previous, steps)
        if passed and whole in steps:
            found[node] = replace(step, previous=whole, passed=(*step.passed, *passed))
    return found


def _whole(value: Any, known: Collection[Any] = ()) -> tuple[Any, tuple[Node, ...]]:
    """What a value is, and the calls that only hand it on; down to what is known."""
    passed: list[Node] = []
    while isinstance(value, Node) and value not in known and (source := stands_for(value)) is not None:
        passed.append(value)
        value = source
    return value, tuple(passed)


def _of_sum(node: Node) -> Iterator[Step]:
    *operands, alpha = bound_arguments(node).values()
    if type(alpha) not in (int, float):
        return
    for i in (0, 1):
        added, by = operands[1 - i], alpha if i else 1
        added = added if i or alpha == 1 else _times(added, alpha, node)
        yield from _kept(node, ("add", i), operands[i], added, by)


def _of_difference(node: Node) -> Iterator[Step]:
    kept, taken, alpha = bound_arguments(node).values()
    if type(alpha) in (int, float) and isinstance(taken, Node):
        yield from _kept(node, "sub", kept, _times(taken, -alpha, node), 1)


def _of_product(node: Node) -> Iterator[Step]:
    bound = bound_arguments(node)
    kept, *factors = list(bound.values())[:3]
    by, times = bound.get("beta", 1), bound.get("value", bound.get("alpha"))
    if type(by) not in (int, float) or type(times) not in (int, float):
        return
    for j in (0, 1) if node.target is _aten.addcmul.default else ():
        decay = factors[1 - j]
        if isinstance(decay, Node):
            decay = _times(decay, times, decay)
            yield Step(node, ("addcmul", j), factors[j], decay, kept, None)
    added = Inner(_PRODUCTS[node.target], tuple(factors), node)
    yield from _kept(node, node.target, kept, _times(added, times, node), by)


def _of_quotient(node: Node) -> Iterator[Step]:
    """A sum with `times * above / below`: either the state stands above, or it is added to."""
    kept, above, below, times = bound_arguments(node).values()
    if type(times) not in (int, float) or not all(isinstance(x, Node) for x in (above, below)):
        return
    yield Step(node, "quotient", above, _times(_inverse(below), times, below), kept, None)
    if val(below).dtype in (torch.float32, torch.float64):
        added = Inner(_aten.mul.Tensor, (above, _inverse(below)), node)
    else:
        # In 16 bits an inverse may overflow where the quotient does not: whoever reads it tells.
        added = Inner(_aten.div.Tensor, (above, below), node)
    yield from _kept(node, node.target, kept, _times(added, times, node), 1)


def _of_batch(node: Node) -> Iterator[Step]:
    """Of products that are summed over a batch."""
    kept, left, right, beta, alpha = bound_arguments(node).values()
    summed = Inner(_aten.einsum.default, ("bij,bjk->ik", (left, right), None), node)
    yield from _kept(node, node.target, kept, _times(summed, alpha, node), beta)


def _of_lerp(node: Node) -> Iterator[Step]:
    start, end, weight = bound_arguments(node).values()
    number = constant_number(weight)
    if number is None and not isinstance(weight, Node):
        return
    share = weight if number is None else number
    rest: Any = 1 - number if number is not None else Inner(_aten.rsub.Scalar, (weight, 1, 1), weight)
    for i, (kept, added, decay, by) in enumerate(((start, end, rest, share), (end, start, share, rest))):
        if isinstance(added, Node):
            yield Step(node, ("lerp", i), kept, decay, Inner(_aten.mul.Tensor, (added, by), node), None)


def _kept(node: Node, form: Hashable, kept: Any, added: Any, by: Any) -> Iterator[Step]:
    """Steps that add to `kept`, `by` times: it is the state, or the state scaled."""
    whole, passed = _whole(kept)
    scaled = whole if isinstance(whole, Node) and whole.op == "call_function" else None
    if scaled is not None and scaled.target is _aten.mul.Tensor:
        for j in (0, 1):
            previous, decay = scaled.args[j], scaled.args[1 - j]
            is_number = type(decay) in (int, float) and isinstance(previous, Node)
            if isinstance(decay, Node) or is_number:
                decay = _times(decay, by, decay)
                yield Step(node, ("mul", form, j), previous, decay, added, scaled, passed)
    if scaled is not None and scaled.target is _aten.div.Tensor and isinstance(scaled.args[0], Node):
        decay = _inverse(scaled.args[1])
        yield Step(node, ("div", form), scaled.args[0], _times(decay, by, decay), added, scaled, passed)
    yield Step(node, form, kept, None if by == 1 else by, added, None)


def _times(value: Any, number: Any, like: Any) -> Any:
    """`value`, scaled by a number."""
    if number == 1:
        return value
    if type(value) in (int, float):
        return value * number
    return Inner(_aten.mul.Tensor, (value, number), like.like if isinstance(like, Inner) else like)


def _inverse(value: Any) -> Any:
    number = constant_number(value)
    if number is not None:
        return 1 / number if number else float("inf")
    return Inner(_aten.reciprocal.default, (value,), value)


_FORMS: dict[Any, Callable[[Node], Iterator[Step]]] = {
    _aten.add.Tensor: _of_sum,
    _aten.sub.Tensor: _of_difference,
    **dict.fromkeys(_PRODUCTS, _of_product),
    _aten.addcdiv.default: _of_quotient,
    _aten.addbmm.default: _of_batch,
    _aten.lerp.Scalar: _of_lerp,
    _aten.lerp.Tensor: _of_lerp,
}
TARGETS = tuple(_FORMS)
"""All that can be a step."""
