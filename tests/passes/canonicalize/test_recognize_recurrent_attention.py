"""Loops over time that carry a matrix for each head: recognised, right with gradients; look-alikes stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.passes.conftest import run_compiled

NAME = "recognize-recurrent-attention"
B, H, T, D, E = 2, 3, 5, 4, 6
Outs = tuple[Tensor, ...]


def gated_channels(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
    """Gates of channels (GLA) formed in each step, a given state that is returned, a scaled query."""
    out = []
    for t in range(T):
        gate = (F.logsigmoid(g[:, :, t]) / 16).exp()
        s = s * gate.unsqueeze(-1) + k[:, :, t].unsqueeze(-1) * v[:, :, t].unsqueeze(-2)
        out.append((q[:, :, t] * D**-0.5).unsqueeze(-2) @ s)
    return torch.cat(out, 2), s


def states_of_ssd(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
    """As Mamba-2 steps: query and key are shared by the heads, a gate of tokens, the value scaled by dt."""
    c, b, x = q[:, 0], k[:, 0], v.transpose(1, 2)
    dt, a = F.softplus(g[..., 0]).transpose(1, 2), -torch.exp(g[0, :, 0, 0])
    s, out = s.new_zeros(B, H, E, D), []
    for t in range(T):
        added = torch.einsum("bh,bn,bhp->bhpn", dt[:, t], b[:, t], x[:, t])
        s = s * torch.exp(dt[:, t] * a)[..., None, None] + added
        out.append(torch.einsum("bhpn,bn->bhp", s, c[:, t]))
    return torch.stack(out, 1), s


def retention(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
    """A constant for each head (RetNet), heads behind tokens, outputs written into zeros, a scaled result."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    gamma = 1 - 2.0 ** (-5 - torch.arange(H, dtype=q.dtype))
    s, out = torch.zeros_like(s), q.new_zeros(B, T, H, E)
    for t in range(T):
        s = gamma[:, None, None] * s + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        out[:, t] = (q[:, t].unsqueeze(-2) @ s).squeeze(-2) * 0.5
    return (out,)


def feature_maps(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
    """No decay; features of query and key in each step."""
    s, out = torch.zeros_like(s), []
    for a, b, c in zip(q.unbind(2), k.unbind(2), v.unbind(2), strict=True):
        s = s + torch.einsum("bhd,bhe->bhde", F.elu(b) + 1, c)
        out.append(torch.einsum("bhd,bhde->bhe", F.elu(a) + 1, s))
    return (torch.stack(out, 2),)


def backwards(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
    """From the last token to the first; a gate of the value; parts of one tensor in each step."""
    packed, out = torch.cat([q, k, v, g], -1).transpose(1, 2), []
    for t in reversed(range(T)):
        a, b, c = packed[:, t, :, :D], packed[:, t, :, D : 2 * D], packed[:, t, :, 2 * D : 2 * D + E]
        gate = packed[:, t, :, 2 * D + E :]
        s = s * gate[..., :1, None].sigmoid() + b[..., None] * c[:, :, None] * gate[..., 3, None, None].cos()
        out.append((a[..., None] * s).sum(-2))
    return torch.stack(out[::-1], 2), s


def without_batch(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
    """One head; what a sigmoid leaves of 1 (as HGRN)."""
    q, k, v, g, s = (x[0, 0] for x in (q, k, v, g, s))
    s, out = torch.zeros_like(s), []
    for t in range(T):
        s = (1 - torch.sigmoid(g[t]))[:, None] * s + torch.outer(k[t], v[t])
        out.append(q[t] @ s)
    return torch.stack(out), s


def merged_heads(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
    """Three dimensions, turned: value by key. A root of a sigmoid, `addcmul`, rows by `bmm`."""
    q, k, v, g = (x.flatten(0, 1) for x in (q, k, v, g))
    s, out = s.flatten(0, 1).mT, []
    for t in range(T):
        added = torch.bmm(v[:, t, :, None], k[:, t, None])
        s = torch.addcmul(added, s, torch.sigmoid(g[:, t, None]) ** 0.25)
        out.append(s @ q[:, t].unsqueeze(-1))
    return torch.cat(out, -1), s


def products_at_once(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
    """All decays and products before the loop; a constant number besides."""
    added, decay, out = k.unsqueeze(-1) * v.unsqueeze(-2), 0.9 * g[..., 0].sigmoid(), []
    for t in range(T):
        s = decay[:, :, t].view(B, H, 1, 1) * s + added[:, :, t]
        out.append(torch.matmul(q[:, :, t, None], s)[:, :, 0])
    return (torch.stack(out, 1),)


SPELLINGS = {
    f.__name__: f
    for f in (gated_channels, states_of_ssd, retention, feature_maps, backwards, without_batch, merged_heads,
              products_at_once)
}  # fmt: skip


def inputs(dtype: torch.dtype = torch.float32, t: int = T) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((B, H, t, D), (B, H, t, D), (B, H, t, E), (B, H, t, D), (B, H, D, E))
    return [torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def total(outs: Sequence[Tensor]) -> Any:
    return sum((y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).cos().view(y.shape)).sum() for y in outs)


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_and_its_gradients(name: str) -> None:
    """In float32 against the loop in float64, and laid out as the loop's results."""
    loop = SPELLINGS[name]
    exact = [x.requires_grad_() for x in inputs(torch.float64)]
    given = [x.requires_grad_() for x in inputs()]
    got, report = run_compiled(loop, *given, pipeline=NAME)
    assert report.ops["linear_attention"] == 1, report.rejected
    assert not report.rejected
    want = loop(*exact)
    for a, b in zip(got, want, strict=True):
        assert a.stride() == b.stride()
        assert (a - b).abs().max() <= 2e-6 * b.abs().max()
    found = [torch.autograd.grad(total(y), x, allow_unused=True) for y, x in ((got, given), (want, exact))]
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert (one - other).abs().max() <= 5e-6 * other.abs().max()


def test_in_float64_as_exact_as_the_loop() -> None:
    given = inputs(torch.float64)
    got, report = run_compiled(gated_channels, *given, pipeline=NAME)
    assert report.ops["linear_attention"] == 1
    for a, b in zip(got, gated_channels(*given), strict=True):
        assert (a - b).abs().max() <= 1e-14 * b.abs().max()


def test_bfloat16_is_nearer_to_the_exact_result_than_the_loop() -> None:
    given = inputs(torch.bfloat16)
    exact = gated_channels(*(x.double() for x in given))
    own = gated_channels(*given)
    got, report = run_compiled(gated_channels, *given, pipeline=NAME)
    assert report.ops["linear_attention"] == 1
    for a, b, c in zip(got, own, exact, strict=True):
        assert a.dtype == b.dtype == torch.bfloat16
        assert (a - c).abs().max() <= (b - c).abs().max()


@pytest.mark.parametrize("lowering", ["eager", pytest.param("auto", marks=pytest.mark.slow)])
def test_among_all_passes_with_gradients(lowering: str) -> None:
    """Both sorts of loop in one graph; neither pass tells of the loop that the other took."""

    def both(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Tensor:
        o, _ = states_of_ssd(q, k, v, g, s)
        h, rate, ys = torch.zeros(B, E, D), -s[0, 0].mT.exp(), []
        length = F.softplus(v[:, 0])
        for t in range(T):
            step, b = length[:, t, :, None], k[:, 0, t, None]
            h = torch.exp(step * rate) * h + step * v[:, 1, t, :, None] * b
            ys.append((h * q[:, 0, t, None]).sum(-1))
        return o.sum(2).sum(-1) + torch.stack(ys, 1).sum(-1)

    given = [x.requires_grad_() for x in inputs()]
    got, report = run_compiled(both, *given, lowering=lowering, outline=False)
    assert report.ops["linear_attention"] == report.ops["selective_scan"] == 1
    assert not [r for r in report.rejected if r.pass_name in (NAME, "recognize-selective-scan")]
    want = both(*given)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    pairs = (torch.autograd.grad(total([y]), given) for y in (got, want))
    for a, b in zip(*pairs, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_more_tokens_than_a_chunk_in_a_graph_that_does_not_grow() -> None:
    def loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Tensor:
        out = []
        for t in range(q.shape[2]):
            s = s * g[:, :, t, :, None].sigmoid() + k[:, :, t, :, None] * v[:, :, t, None]
            out.append((q[:, :, t, :, None] * s).sum(-2))
        return torch.stack(out, 2)

    sizes = []
    for t in (3, 19):
        given = inputs(t=t)
        got, report = run_compiled(loop, *given, pipeline=NAME)
        want = loop(*(x.double() for x in given))
        assert (got - want).abs().max() <= 5e-6 * want.abs().max()
        sizes.append(report.graphs[0].nodes_after)
    assert sizes[0] == sizes[1]


def test_another_length_is_another_graph_and_a_symbolic_batch_is_one() -> None:
    """The loop's length is that of the call; sizes beside it may be symbols."""

    def loop(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s, out = q.new_zeros(q.shape[0], H, D, E), []
        for t in range(q.shape[2]):
            s = 0.5 * s + k[:, :, t, :, None] * v[:, :, t, None]
            out.append(q[:, :, t, None] @ s)
        return torch.cat(out, 2)

    given = inputs()[:3]
    got, report = run_compiled(loop, *given, dynamic=True, pipeline=NAME)
    assert report.ops["linear_attention"] == 1, report.rejected
    torch.testing.assert_close(got, loop(*given), rtol=1e-5, atol=1e-5)


Body = Callable[..., Any]


def looped(update: Body, read: Body | None = None) -> Body:
    """A loop by what a step makes of the state, and what is read of it."""

    def loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Tensor:
        out = []
        for t in range(q.shape[2]):
            kv = k[:, :, t, :, None] * v[:, :, t, None]
            s = update(s, kv, g, t)
            weighed = (q[:, :, t, :, None] * s).sum(-2)
            out.append(read(weighed, q, s, t) if read is not None else weighed)
        return torch.stack(out, 2)

    return loop


def test_a_gate_that_forgets_everything() -> None:
    """exp(-inf): what came before is gone, and nothing is NaN."""

    def loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Tensor:
        return looped(lambda s, kv, g, t: s * g[:, :, t, :, None].exp() + kv)(q, k, v, g, s)

    given = inputs()
    given[3][:, :, 2] = -torch.inf
    with torch.no_grad():
        got, report = run_compiled(loop, *given, pipeline=NAME)
    assert report.ops["linear_attention"] == 1
    torch.testing.assert_close(got, loop(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("end", ["as it is", "read as memory"])
def test_results_keep_their_layout(end: str) -> None:
    """Written into a tensor whose axes lie in another order, from a state that does; with gradients too."""

    def loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Outs:
        s, out = s.mT.contiguous().mT, torch.empty_like(v.transpose(1, 2).contiguous().transpose(1, 2))
        for t in range(T):
            s = s * g[:, :, t, :, None].sigmoid() + k[:, :, t, :, None] * v[:, :, t, None]
            out[:, :, t] = (q[:, :, t, :, None] * s).sum(-2)
        if end == "read as memory":
            return tuple(torch.as_strided(x, (x.numel(),), (1,)) for x in (out, s))
        return out, s

    given = inputs(torch.float64)
    got, report = run_compiled(loop, *given, pipeline=NAME)
    assert report.ops["linear_attention"] == 1
    for a, b in zip(got, loop(*given), strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_gate_that_is_not_finite_spoils_zeros(number: float) -> None:
    """0 * NaN is NaN, from the first token on; a loss that is so stays so."""

    def loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Tensor:
        s, out = torch.zeros_like(s), []
        for t in range(T):
            s = s * g[:, :, t, :, None].exp() + k[:, :, t, :, None] * v[:, :, t, None]
            out.append((q[:, :, t, :, None] * s).sum(-2))
        return torch.stack(out, 2)

    given = inputs()
    given[3][0, 1, 0, 2] = number
    got, report = run_compiled(loop, *given, pipeline=NAME)
    assert report.ops["linear_attention"] == 1
    want = loop(*given)
    assert not bool(want[0, 1].isfinite().any())
    assert torch.equal(got.isfinite(), want.isfinite())
