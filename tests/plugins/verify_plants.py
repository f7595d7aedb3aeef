"""Rules with a bug planted in them, each beside the right one, for the checks of rewrites."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effopt.graph import ops
from effopt.graph.pattern import ANY
from effopt.passes.base import Rewrite
from tests.plugins.planted import rule

aten = torch.ops.aten


@dataclass(frozen=True)
class Plant:
    """A model, the right rule for it, and a wrong one."""

    name: str
    model: Any
    inputs: tuple[Any, ...]
    right: Rewrite
    wrong: Rewrite
    complaint: str = "check failed"
    training: bool = False


def randn(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*sizes, dtype=dtype, generator=torch.Generator().manual_seed(0))


def softmax_of(name: str, change: Any) -> Rewrite:
    return rule(name, lambda op, x, d: op.softmax(x, d), lambda emit, m: change(emit, m))


def keep_softmax(emit: Any, m: Any) -> Any:
    return emit(aten._softmax.default, m.x, m.d, False)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def norm_rule(name: str, eps: float, offset: float = 0.0) -> Rewrite:
    def pattern(op: Any, x: Any, weight: Any) -> Any:
        return op.mul(op.mul(x, op.rsqrt(op.add(op.mean(op.pow(x, 2), [-1], True), 1e-6))), weight)

    return rule(name, pattern, lambda emit, m: emit(ops.rms_norm, m.x, m.weight, eps, weight_offset=offset))


def masked_rule(name: str, keep_mask: bool) -> Rewrite:
    def rewrite(emit: Any, m: Any) -> Any:
        scores = emit(aten.add.Tensor, m.mask, m.x) if keep_mask else m.x
        return emit(aten._softmax.default, scores, -1, False)

    return rule(name, lambda op, x, mask: op.softmax(op.add(x, mask), -1), rewrite)


def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, floor: float = float("-inf")) -> Tensor:
    scores = torch.where(keep, q @ k.transpose(-2, -1) * 0.5, floor)
    return scores.softmax(-1) @ v


def attention_pattern(op: Any, q: Any, k: Any, v: Any, keep: Any, floor: Any) -> Any:
    scores = op.mul(op.matmul(q, op.transpose(k, -2, -1)), 0.5)
    return op.matmul(op.softmax(op.where(keep, scores, floor), -1), v)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attention(q, k, v, torch.arange(6)[None, :] <= torch.arange(6)[:, None])


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    near = torch.arange(6)[None, :] > torch.arange(6)[:, None] - 5
    return attention(q, k, v, near & (torch.arange(6)[None, :] <= torch.arange(6)[:, None]))


def as_causal(emit: Any, m: Any) -> Any:
    return emit(ops.attention, m.q, m.k, m.v, scale=0.5, is_causal=True)


def with_mask(zero_masked_rows: bool) -> Any:
    def rewrite(emit: Any, m: Any) -> Any:
        return emit(ops.attention, m.q, m.k, m.v, scale=0.5, mask=m.keep, zero_masked_rows=zero_masked_rows)

    return rewrite


def add_norm(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x + y
    return total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6) * weight, total * 2


def add_norm_rule(name: str, wrong: bool) -> Rewrite:
    def pattern(op: Any, x: Any, y: Any, weight: Any) -> Any:
        total = op.add(x, y)
        return op.mul(op.mul(total, op.rsqrt(op.add(op.mean(op.pow(total, 2), [-1], True), 1e-6))), weight)

    def rewrite(emit: Any, m: Any) -> Any:
        both = emit(ops.add_rms_norm, m.x, m.y, m.weight, 1e-6)
        normed, total = emit(operator.getitem, both, 0), emit(operator.getitem, both, 1)
        return (normed, m.x) if wrong else (normed, total)

    def outputs(self: Any, m: Any) -> Any:
        return (m.root, next(n for n in m.nodes if n.target is aten.add.Tensor and set(n.args) == {m.x, m.y}))

    return rule(name, pattern, rewrite, outputs=outputs)


def repeat_heads(x: Tensor) -> Tensor:
    return x[:, :, None].expand(2, 2, 3, 4, 8).reshape(2, 6, 4, 8)


def repeat_rule(name: str, sizes: list[int], at: int) -> Rewrite:
    def pattern(op: Any, x: Any, s: Any, t: Any) -> Any:
        return op._unsafe_view(op.clone(op.expand(op.unsqueeze(x, 2), s), memory_format=ANY), t)

    def rewrite(emit: Any, m: Any) -> Any:
        return emit(
            aten.reshape.default, emit(aten.expand.default, emit(aten.unsqueeze.default, m.x, at), sizes), m.t
        )

    return rule(name, pattern, rewrite)


def with_dropout(p: float) -> Any:
    return lambda emit, m: emit(aten.dropout.default, emit(aten.relu.default, m.x), p, True)


def relu_pattern(op: Any, x: Any) -> Any:
    return op.relu(x)


PLANTS = (
    Plant(
        "transpose",
        lambda q, k: q @ k.transpose(-2, -1),
        (randn(2, 5, 5), randn(2, 5, 5)),
        rule(
            "t",
            lambda op, q, k: op.matmul(q, op.transpose(k, -2, -1)),
            lambda e, m: e(aten.matmul.default, m.q, e(aten.permute.default, m.k, [0, 2, 1])),
        ),
        rule(
            "t",
            lambda op, q, k: op.matmul(q, op.transpose(k, -2, -1)),
            lambda e, m: e(aten.matmul.default, m.q, m.k),
        ),
    ),
    Plant(
        "softmax over another dimension",
        lambda x: x.softmax(-1),
        (randn(2, 5, 5),),
        softmax_of("s", keep_softmax),
        softmax_of("s", lambda emit, m: emit(aten._softmax.default, m.x, -2, False)),
    ),
    Plant(
        "scale",
        lambda x: (x * 0.125).softmax(-1),
        (randn(2, 5, 7),),
        rule(
            "s",
            lambda op, x: op.softmax(op.mul(x, 0.125), -1),
            lambda e, m: e(aten._softmax.default, e(aten.div.Tensor, m.x, 8.0), -1, False),
        ),
        rule(
            "s",
            lambda op, x: op.softmax(op.mul(x, 0.125), -1),
            lambda e, m: e(aten._softmax.default, e(aten.div.Tensor, m.x, 9.0), -1, False),
        ),
    ),
    Plant("missing epsilon", rms_norm, (randn(3, 16), randn(16)), norm_rule("n", 1e-6), norm_rule("n", 0.0)),
    Plant("larger epsilon", rms_norm, (randn(3, 16), randn(16)), norm_rule("n", 1e-6), norm_rule("n", 1e-5)),
    Plant(
        "weight offset", rms_norm, (randn(3, 16), randn(16)), norm_rule("n", 1e-6), norm_rule("n", 1e-6, 1.0)
    ),
    Plant(
        "dropped mask",
        lambda x, mask: (x + mask).softmax(-1),
        (randn(2, 4, 5, 5), torch.zeros(2, 1, 5, 5).masked_fill(randn(2, 1, 5, 5) > 1, float("-inf"))),
        masked_rule("m", keep_mask=True),
        masked_rule("m", keep_mask=False),
    ),
    Plant(
        "rows that are fully masked",
        attention,
        (randn(2, 2, 6, 8), randn(2, 2, 6, 8), randn(2, 2, 6, 8), torch.ones(6, 6, dtype=torch.bool)),
        rule("a", attention_pattern, with_mask(False)),
        rule("a", attention_pattern, with_mask(True)),
        complaint="NaN",
    ),
    Plant(
        "a causal mask is a fact of the graph",
        causal,
        (randn(2, 2, 6, 8), randn(2, 2, 6, 8), randn(2, 2, 6, 8)),
        rule("a", attention_pattern, as_causal),
        rule("a", attention_pattern, lambda emit, m: emit(ops.attention, m.q, m.k, m.v, scale=0.5)),
    ),
    Plant(
        "a window is not causal",
        window,
        (randn(2, 2, 6, 8), randn(2, 2, 6, 8), randn(2, 2, 6, 8)),
        rule("a", attention_pattern, with_mask(False)),
        rule("a", attention_pattern, as_causal),
    ),
    Plant(
        "several results",
        add_norm,
        (randn(3, 16), randn(3, 16), randn(16)),
        add_norm_rule("r", wrong=False),
        add_norm_rule("r", wrong=True),
    ),
    Plant(
        "repeated heads in another order",
        repeat_heads,
        (randn(2, 2, 4, 8),),
        repeat_rule("h", [2, 2, 3, 4, 8], 2),
        repeat_rule("h", [2, 3, 2, 4, 8], 1),
    ),
    Plant(
        "operand order",
        lambda x, y: x - y,
        (randn(4, 4), randn(4, 4)),
        rule(
            "o", lambda op, x, y: op.sub(x, y), lambda e, m: e(aten.add.Tensor, e(aten.neg.default, m.y), m.x)
        ),
        rule("o", lambda op, x, y: op.sub(x, y), lambda e, m: e(aten.sub.Tensor, m.y, m.x)),
    ),
    Plant(
        "a gradient that is cut",
        lambda x: x.sigmoid() * 2,
        (randn(4, 4).requires_grad_(),),
        rule(
            "g",
            lambda op, x: op.mul(op.sigmoid(x), 2),
            lambda e, m: e(aten.add.Tensor, e(aten.sigmoid.default, m.x), e(aten.sigmoid.default, m.x)),
        ),
        rule(
            "g",
            lambda op, x: op.mul(op.sigmoid(x), 2),
            lambda e, m: e(aten.mul.Tensor, e(aten.detach.default, e(aten.sigmoid.default, m.x)), 2),
        ),
        complaint="gradients",
        training=True,
    ),
    Plant(
        "another dropout probability",
        lambda x: F.dropout(x.relu(), 0.1, True),
        (randn(4, 4).requires_grad_(),),
        rule("d", lambda op, x: op.dropout(op.relu(x), 0.1, True), with_dropout(0.1)),
        rule("d", lambda op, x: op.dropout(op.relu(x), 0.1, True), with_dropout(0.2)),
        complaint="dropout",
        training=True,
    ),
    Plant(
        "a fact about an operand that both read",
        lambda x: (x * x).relu(),
        (randn(4, 4),),
        rule("f", relu_pattern, lambda e, m: e(aten.abs.default, m.x)),
        rule("f", relu_pattern, lambda e, m: e(aten.neg.default, m.x)),
    ),
)
