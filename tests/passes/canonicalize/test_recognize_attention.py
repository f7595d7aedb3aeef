"""Every spelling of attention that we know of is one op; look-alikes are left alone, and say why."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from effopt.passes.canonicalize.recognize_attention import RecognizeAttention

B, H, T, S, D = 2, 4, 5, 7, 16
INF = float("inf")
MIN = torch.finfo(torch.float32).min


def operands(dtype: torch.dtype = torch.float32, kv_heads: int = H) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(B, h, n, D, dtype=dtype) for h, n in ((H, T), (kv_heads, S), (kv_heads, S))]


def keep_mask() -> Tensor:
    keep = torch.rand(B, 1, T, S, generator=torch.Generator().manual_seed(3)) > 0.4
    keep[..., 0] = True
    keep[0, 0, 2] = False
    return keep


def repeated(x: Tensor, n: int) -> Tensor:
    b, h, s, d = x.shape
    return x[:, :, None].expand(b, h, n, s, d).reshape(b, h * n, s, d)


def softmaxed(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


def spelled(scores: Tensor) -> Tensor:
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True)


ROOT = D**-0.25
PLAIN: dict[str, Callable[..., Tensor]] = {
    "no scale": lambda q, k, v: softmaxed(q @ k.mT) @ v,
    "scores divided": lambda q, k, v: softmaxed(q @ k.transpose(-2, -1) / math.sqrt(D)) @ v,
    "scores times number": lambda q, k, v: softmaxed(0.25 * torch.matmul(q, k.transpose(2, 3))) @ v,
    "scores over tensor": lambda q, k, v: softmaxed(q @ k.mT / torch.full([], 4.0)) @ v,
    "query scaled": lambda q, k, v: softmaxed((q * 0.25) @ k.mT) @ v,
    "key scaled": lambda q, k, v: softmaxed(q @ (k / 4.0).mT) @ v,
    "transposed key scaled": lambda q, k, v: softmaxed(q @ (k.mT * 0.25)) @ v,
    "both by the root": lambda q, k, v: softmaxed((q * ROOT) @ (k * ROOT).mT) @ v,
    "head scale": lambda q, k, v: softmaxed(q @ k.mT * torch.arange(1.0, H + 1).view(H, 1, 1)) @ v,
    "soft-cap": lambda q, k, v: softmaxed(torch.tanh(q @ k.mT / 8.0) * 8.0) @ v,
    "permuted key": lambda q, k, v: softmaxed(q @ k.permute(0, 1, 3, 2)) @ v,
    "einsum": lambda q, k, v: torch.einsum(
        "bhts,bhsd->bhtd", softmaxed(torch.einsum("bhtd,bhsd->bhts", q, k)), v
    ),
    "einsum, heads third": lambda q, k, v: torch.einsum(
        "bhqk,bkhd->bqhd",
        softmaxed(torch.einsum("bqhd,bkhd->bhqk", q.transpose(1, 2), k.transpose(1, 2)) / 4.0),
        v.transpose(1, 2),
    ),
    "bmm": lambda q, k, v: torch.bmm(
        softmaxed(torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT)), v.flatten(0, 1)
    ),
    "softmax written out": lambda q, k, v: spelled(q @ k.mT * 0.3) @ v,
    "row maximum subtracted first": lambda q, k, v: (
        softmaxed((s := q @ k.mT) - s.max(-1, keepdim=True).values) @ v
    ),
    "upcast by dtype": lambda q, k, v: torch.softmax(q @ k.mT, -1, dtype=torch.float32).to(q.dtype) @ v,
    "upcast by cast": lambda q, k, v: softmaxed((q @ k.mT).float()).type_as(q) @ v,
    "no dropout": lambda q, k, v: F.dropout(softmaxed(q @ k.mT), 0.5, training=False) @ v,
    "single head": lambda q, k, v: softmaxed(q[0, 0] @ k[0, 0].mT) @ v[0, 0],
    "three dimensions": lambda q, k, v: softmaxed(q[0] @ k[0].mT) @ v[0],
    "library call": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
}


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_spelling(name: str, dtype: torch.dtype, compiled: Any) -> None:
    if dtype == torch.bfloat16 and name in ("head scale", "scores over tensor"):
        pytest.skip("the float32 factor makes the product float32, which matmul refuses in eager too")
    inputs = operands(dtype)
    out, report = compiled(PLAIN[name], *inputs)
    assert report.ops["attention"] == 1, report.rejected
    wanted, exact = PLAIN[name](*inputs), PLAIN[name](*(x.double() for x in inputs))
    assert out.dtype == wanted.dtype
    # Eager rounds its scores to bfloat16: no further from float64 than it is, and a rounding of the result.
    error = {torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]
    assert (out - exact).abs().max() <= (wanted - exact).abs().max() + error * exact.abs().max()


@pytest.mark.parametrize("name", sorted(set(PLAIN) - {"library call"}))
def test_spelling_with_symbolic_sizes(name: str, compiled: Any) -> None:
    inputs = [torch.nn.functional.pad(x, (0, 0, 0, 3)) for x in operands()]
    for x in inputs:
        torch._dynamo.maybe_mark_dynamic(x, 2)
    out, report = compiled(PLAIN[name], *inputs)
    assert report.ops["attention"] == 1, report.rejected
    torch.testing.assert_close(out, PLAIN[name](*inputs), rtol=1e-5, atol=1e-5)


GROUPED: dict[str, Callable[..., Tensor]] = {
    "expand": lambda q, k, v: softmaxed(q @ repeated(k, 2).mT) @ repeated(v, 2),
    "repeat_interleave": lambda q, k, v: (
        softmaxed(q @ k.repeat_interleave(2, 1).mT) @ v.repeat_interleave(2, dim=1)
    ),
    "enable_gqa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "call on repeated": lambda q, k, v: F.scaled_dot_product_attention(q, repeated(k, 2), repeated(v, 2)),
}


@pytest.mark.parametrize("name", GROUPED)
def test_kv_heads_are_bound_before_they_are_repeated(name: str, compiled: Any) -> None:
    inputs = operands(kv_heads=2)
    found = []
    out, report = compiled(GROUPED[name], *inputs, plugins=[Spy(found)])
    assert report.ops["attention"] == 1, report.rejected
    assert found == [(B, 2, S, D)]
    torch.testing.assert_close(out, GROUPED[name](*inputs), rtol=1e-5, atol=1e-5)


class Spy:
    """Notes the key shapes of the attention ops at the end of the pipeline."""

    def __init__(self, found: list[tuple[int, ...]]) -> None:
        self.found = found

    from effopt.plugins.hookspec import hookimpl

    @hookimpl(wrapper=True)
    def effopt_run_pass(self, pass_: Any, module: Any, context: Any) -> Any:
        result = yield
        if pass_.name == "prove-rows-see-key":
            nodes = [n for n in module.graph.nodes if "effopt.attention" in str(n.target)]
            self.found += [tuple(n.args[1].meta["val"].shape) for n in nodes]
        return result


def test_tiled_heads_are_not_grouped(compiled: Any) -> None:
    """`repeat` puts head 0 of key next to head 1: query head 1 reads KV head 1, not 0."""
    q, k, v = operands(kv_heads=2)
    tiled = lambda q, k, v: softmaxed(q @ k.repeat(1, 2, 1, 1).mT) @ v.repeat(1, 2, 1, 1)  # noqa: E731
    found: list[tuple[int, ...]] = []
    out, _ = compiled(tiled, q, k, v, plugins=[Spy(found)])
    assert found == [(B, 4, S, D)]
    torch.testing.assert_close(out, tiled(q, k, v), rtol=1e-5, atol=1e-5)


MASKED: dict[str, Callable[..., Tensor]] = {
    "added": lambda s, m: s * 0.3 + torch.where(m, 0.0, MIN),
    "added first": lambda s, m: torch.where(m, 0.0, -INF) + s / 3.0,
    "two terms": lambda s, m: s * 0.3 + m.float() + torch.where(m, 0.0, -1e9),
    "subtracted": lambda s, m: s - 1e4 * (1.0 - m.float()),
    "masked_fill": lambda s, m: (s * 0.3).masked_fill(~m, -INF),
    "masked_fill, finite": lambda s, m: (s * 0.3).masked_fill(m == 0, -1e4),
    "where": lambda s, m: torch.where(m, s, MIN),
    "where, inverted": lambda s, m: torch.where(m.logical_not(), -INF, s),
    "where, tensor fill": lambda s, m: torch.where(m, s, torch.tensor(-INF)),
    "mask, then bias": lambda s, m: torch.where(m, s, MIN) + m.float(),
    "-inf mask, then bias": lambda s, m: s.masked_fill(~m, -INF) + m.float(),
    "two masks": lambda s, m: s.masked_fill(~m, -INF).masked_fill(~m[..., :1], -INF),
    "scaled after the mask": lambda s, m: (s + torch.where(m, 0.0, -1e30)) / 4.0,
    "scaled after masked_fill": lambda s, m: s.masked_fill(~m, -1e4) * 0.25,
    "capped, then masked": lambda s, m: (5.0 * torch.tanh(s / 5.0)).masked_fill(~m, -INF),
    "bias, then mask": lambda s, m: (s + m.float()).masked_fill(~m, MIN),
    "four to three dimensions": lambda s, m: (
        (s + torch.where(m, 0.0, MIN)).view(B * H, T, S).view(B, H, T, S)
    ),
}


@pytest.mark.parametrize("name", MASKED)
def test_mask_keeps_the_result_of_rows_without_a_key(name: str, compiled: Any) -> None:
    q, k, v = operands()
    function = lambda q, k, v, m: softmaxed(MASKED[name](q @ k.mT, m)) @ v  # noqa: E731
    keep = keep_mask()
    out, report = compiled(function, q, k, v, keep)
    assert report.ops["attention"] == 1, report.rejected
    torch.testing.assert_close(out, function(q, k, v, keep), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_merged_heads_with_added_bias(compiled: Any) -> None:
    def bloom(q: Tensor, k: Tensor, v: Tensor, alibi: Tensor, m: Tensor) -> Tensor:
        flat = [x.reshape(B * H, -1, D) for x in (q, k, v)]
        scores = alibi.baddbmm(flat[0], flat[1].mT, beta=0.5, alpha=0.25).view(B, H, T, S)
        return torch.bmm(softmaxed(scores + m).view(B * H, T, S), flat[2]).view(B, H, T, D)

    inputs = (*operands(), torch.randn(B * H, 1, S), torch.where(keep_mask(), 0.0, MIN))
    out, report = compiled(bloom, *inputs)
    assert report.ops["attention"] == 1, report.rejected
    torch.testing.assert_close(out, bloom(*inputs), rtol=1e-5, atol=1e-5)


def test_sinks(compiled: Any) -> None:
    def with_sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        column = sinks.reshape(1, -1, 1, 1).expand(B, -1, T, -1)
        logits = torch.cat([q @ k.mT * 0.25, column], dim=-1)
        logits = logits - logits.max(dim=-1, keepdim=True).values
        return logits.softmax(-1)[..., :-1] @ v

    inputs = (*operands(), torch.randn(H))
    out, report = compiled(with_sinks, *inputs)
    assert report.ops["attention"] == 1, report.rejected
    torch.testing.assert_close(out, with_sinks(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("call", [F.dropout, lambda w, p: torch.native_dropout(w, p, True)[0]])
def test_dropout_is_kept(call: Any, compiled: Any) -> None:
    q, k, _ = operands()
    ones = torch.ones(B, H, S, D)
    out, report = compiled(lambda q, k, v: call(softmaxed(q @ k.mT), 0.5) @ v, q, k, ones)
    assert report.ops["attention"] == 1, report.rejected
    assert 0.7 < out.mean() < 1.3
    assert out.std() > 0.1


def test_gradients_with_bias_and_grouped_queries(compiled: Any) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return softmaxed(q @ repeated(k, 2).mT * 0.25 + bias) @ repeated(v, 2)

    inputs = [x.requires_grad_() for x in (*operands(kv_heads=2), torch.randn(H, T, S))]
    out, report = compiled(function, *inputs)
    assert report.ops["attention"] == 1, report.rejected
    direction = torch.randn_like(out)
    got = torch.autograd.grad((out * direction).sum(), inputs)
    wanted = torch.autograd.grad((function(*inputs) * direction).sum(), inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_rows_without_a_key_have_no_gradient_after_a_library_call(compiled: Any) -> None:
    q, k, v = (x.requires_grad_() for x in operands())
    out, _ = compiled(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), q, k, v, keep_mask())
    got = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in got)
    assert (out[0, :, 2] == 0).all()


SQUARE = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(0))
REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "softmax over queries": (lambda q: (q @ q.mT).softmax(-2) @ q, "dim is"),
    "softmax over heads": (lambda q: (q @ q.mT).softmax(1) @ q, "dim is"),
    "weights returned": (lambda q: [w := (q @ q.mT).softmax(-1), w @ q], "also used by"),
    "dropout before softmax": (lambda q: F.dropout(q @ q.mT, 0.5).softmax(-1) @ q, "before softmax"),
    "negative scale after a mask": (lambda q: ((q @ q.mT + q) * -1.0).softmax(-1) @ q, "negative"),
    "two fills": (
        lambda q: (q @ q.mT).masked_fill(q > 0, -1.0).masked_fill(q < -1, -2.0).softmax(-1) @ q,
        "two masks fill with different numbers",
    ),
    "finite mask, then bias": (
        lambda q: ((q @ q.mT).masked_fill(q > 0, -1e4) + q).softmax(-1) @ q,
        "before masking",
    ),
    "scores times scores": (lambda q: ((q @ q.mT) * q).softmax(-1) @ q, "differs between keys"),
    "shared matrix": (lambda q: (q @ q[0, 0]).softmax(-1) @ q, "different ranks"),
    "weights transposed": (lambda q: (q @ q.mT).softmax(-1).mT @ q, "used by aten.transpose"),
    "linear attention": (lambda q: q.softmax(-1) @ (q.softmax(-2).mT @ q), "expected"),
    "exp of scores": (lambda q: torch.sigmoid(q @ q.mT).softmax(-1) @ q, "sigmoid"),
    "product with itself": (lambda q: (w := (q @ q.mT).softmax(-1)) @ w, "both a step"),
    "scores doubled": (lambda q: ((s := q @ q.mT) + s).softmax(-1) @ q, "both a step"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_look_alike_is_left_alone(name: str, compiled: Any) -> None:
    function, reason = REFUSED[name]
    out, report = compiled(function, SQUARE)
    assert report.ops["attention"] == 0
    reasons = [r.reason for r in report.rejected if r.pass_name == RecognizeAttention.name]
    assert any(reason in r for r in reasons), reasons
    if "dropout" not in name:
        torch.testing.assert_close(out, function(SQUARE))


def test_key_with_heads_in_place_of_keys_is_computed_as_written(compiled: Any) -> None:
    """`permute(0, 2, 3, 1)` is no (-2, -1) transpose (pytorch/pytorch#195320): heads become keys."""
    function = lambda q, k, v: softmaxed(q @ k.permute(0, 2, 3, 1) / 4.0) @ v  # noqa: E731
    q, k, v = (torch.randn(2, 6, 6, 16) for _ in range(3))
    out, _ = compiled(function, q, k, v)
    torch.testing.assert_close(out, function(q, k, v), rtol=1e-5, atol=1e-5)


def test_softmax_that_is_no_attention_is_not_told_of(compiled: Any) -> None:
    def router(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(F.softmax(F.linear(x, w), -1).topk(2))

    x, w = torch.randn(6, 8), torch.randn(4, 8)
    out, report = compiled(router, x, w)
    assert not report.rejected
    torch.testing.assert_close(out, router(x, w))
