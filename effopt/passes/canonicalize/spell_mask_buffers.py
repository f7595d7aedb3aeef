"""Compute a mask that a model holds in a buffer.

    self.register_buffer("bias", torch.tril(torch.ones(n, n)))
    scores.masked_fill(self.bias[:t, :t] == 0, -inf)
      =>  scores.masked_fill(where(arange(n) <= arange(n)[:, None], 1, 0)[:t, :t] == 0, -inf)

Exact, and guarded: the buffer is one of two values, by column minus row, when the graph is compiled. Each
call looks whether it was written or replaced; if it then holds something else, the graph runs as it is
compiled without this pass. A write through `.data`, which PyTorch does not count, is not seen. Buffers that
the graph writes or returns, that want a gradient, or that mask nothing are left alone. No training needed.
Saves nothing by itself: a computed mask is proved causal, or a window, where a tensor could hold anything.

Source: the buffer of GPT-2, Radford et al. 2019 (its causal mask), as models spell it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from effopt.graph.driver import apply_found
from effopt.graph.held_masks import STANDS_ON, Band
from effopt.graph.normalize import is_view, view_root
from effopt.graph.rewrite import Emit, Match, PassResult
from effopt.graph.values import val
from effopt.passes.base import Context, Example, GraphPass, Stage

_aten = torch.ops.aten
_READ_ON = frozenset(
    "eq ne gt ge lt le logical_not logical_and logical_or bitwise_not _to_copy clone".split()
)
"""Ops through which a mask is still one."""
_SELECTS = frozenset("where masked_fill scaled_dot_product_attention".split())
_WEIGHS = frozenset("add sub mul".split())


@dataclass(frozen=True)
class SpellMaskBuffers(GraphPass):
    """A graph pass: what it looks at is the value of an input, which no pattern can say."""

    name: ClassVar[str] = "spell-mask-buffers"
    stage: ClassVar[Stage] = Stage.CANONICALIZE
    provides: ClassVar[tuple[str, ...]] = (STANDS_ON,)
    may_duplicate: ClassVar[bool] = True

    def apply(self, module: GraphModule, context: Context) -> PassResult:
        """Send the readers of each such buffer to index arithmetic of its values."""
        outputs = module.graph.output_node().all_input_nodes
        returned = {view_root(node) for node in outputs}
        found: dict[int, Match] = {}
        for position, node in enumerate(module.graph.find_nodes(op="placeholder")):
            if node not in returned and _masks_something(node):
                band = context.masks.read(node, position)
                found |= {} if band is None else {position: Match(node, (), {"band": band})}
        result = apply_found(self, module, list(found.values()), context.approve)
        for position, match in found.items():
            if not match.root.users:
                context.masks.stand_on(position, match.band)
        return result

    def legal(self, m: Match) -> None:
        """All that was found."""

    def outputs(self, m: Match) -> tuple[Node, ...]:
        return (m.root,)

    def rewrite(self, emit: Emit, m: Match) -> Node:
        emit.note = f"{_text(m.band)}; guarded"
        return _write(emit, m.root, m.band)

    def samples(self) -> Iterable[Example]:
        x = torch.randn(2, 5, 8)
        yield Example(_Masked(torch.ones(9, 9, dtype=torch.bool).tril()), (x,))
        yield Example(_Masked(torch.ones(1, 9, 9).tril()), (x,))
        yield Example(_Masked(torch.ones(9, 9, dtype=torch.bool).tril().triu(-3)), (x,))
        yield Example(_Masked(torch.ones(9, 9, dtype=torch.uint8).triu(1) == 0), (x,))

    def refusals(self) -> Iterable[Example]:
        x = torch.randn(2, 5, 8)
        gap = torch.ones(9, 9, dtype=torch.bool).tril()
        gap[7, 3] = False
        yield Example(_Masked(gap), (x,))
        yield Example(_Masked(torch.ones(9, 9).tril() + torch.eye(9)), (x,))
        yield Example(_Masked(torch.ones(9, 9)), (x,))
        weights = _Masked(torch.ones(9, 9).tril())
        weights.forward = lambda x: x @ weights.mask[:8, :8]  # type: ignore[method-assign, index]
        yield Example(weights, (x,))
        given = torch.ones(5, 5, dtype=torch.bool).tril()
        yield Example(lambda x, m: (x @ x.mT).masked_fill(~m, -1e9).softmax(-1) @ x, (x, given))


def _masks_something(node: Node) -> bool:
    """Whether a buffer selects among values, or weighs values that are computed, unlike a weight."""
    for user in node.users:
        name = getattr(getattr(user.target, "overloadpacket", None), "__name__", "")
        computed = any(a.op == "call_function" for a in user.all_input_nodes if a is not node)
        if name in _SELECTS or (name in _WEIGHS and computed):
            return True
        if (is_view(user) or name in _READ_ON) and _masks_something(user):
            return True
    return False


def _text(band: Band) -> str:
    low, high = ("" if bound is None else str(bound) for bound in (band.low, band.high))
    return f"{band.inside} where column - row is in {low} .. {high}, else {band.outside}"


def _write(emit: Emit, node: Node, band: Band) -> Node:
    (t, s), device = band.shape[-2:], val(node).device
    columns = emit(_aten.arange.default, s, device=device)
    rows = emit(_aten.unsqueeze.default, emit(_aten.arange.default, t, device=device), -1)
    apart = emit(_aten.sub.Tensor, columns, rows)
    seen: Node | None = None
    for op, bound in ((_aten.ge.Scalar, band.low), (_aten.le.Scalar, band.high)):
        if bound is not None:
            condition = emit(op, apart, bound)
            seen = condition if seen is None else emit(_aten.logical_and.default, seen, condition)
    assert seen is not None, "a band that hides nothing is none"
    if {band.inside, band.outside} == {0, 1}:
        seen = seen if band.inside else emit(_aten.logical_not.default, seen)
        seen = emit.cast(seen, band.dtype)
    else:
        inside, outside = (
            emit(_aten.full.default, [], value, dtype=band.dtype, device=device)
            for value in (band.inside, band.outside)
        )
        seen = emit(_aten.where.self, seen, inside, outside)
    return emit(_aten.view.default, seen, list(band.shape))


class _Masked(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Any:
        t, mask = x.shape[-2], self.mask
        assert isinstance(mask, Tensor)
        hidden = mask[..., :t, :t] == 0
        return (x @ x.mT).masked_fill(hidden, -1e9).softmax(-1) @ x
