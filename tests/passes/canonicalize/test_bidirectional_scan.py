"""Hydra: a scan, a scan from behind, both shifted by one token, and a diagonal.

    y = shift(scan(x)) + flip(shift(scan(flip(x)))) + d * x

is the product with a quasi-separable matrix (Hwang et al. 2024, arXiv:2407.09941). Written in
plain PyTorch with loops over time, both scans must become calls, and the layer must train as it did.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.passes.conftest import run_compiled

BATCH, TOKENS, SIZE, HEADS, STATE = 2, 7, 6, 3, 4
Scan = Callable[..., Tensor]


def selective(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, reverse: bool = False) -> Tensor:
    """A rate for each channel and number of the state; `[b, t, d]` in and out."""
    h, ys = x.new_zeros(x.shape[0], *a.shape), []
    for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        step = dt[:, t, :, None]
        h = torch.exp(step * a) * h + step * b[:, t, None] * x[:, t, :, None]
        ys.append((h * c[:, t, None]).sum(-1))
    return torch.stack(ys[::-1] if reverse else ys, 1)


def by_heads(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, reverse: bool = False) -> Tensor:
    """A rate for each head, as Mamba-2 and Hydra's own code have it: `a` and `dt` of one channel a head."""
    x, dt, rate = x.unflatten(-1, (HEADS, -1)), dt[..., :HEADS], a[:HEADS, 0]
    h, ys = x.new_zeros(x.shape[0], *x.shape[2:], b.shape[-1]), []
    for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        added = torch.einsum("bh,bn,bhp->bhpn", dt[:, t], b[:, t], x[:, t])
        h = torch.exp(dt[:, t] * rate)[..., None, None] * h + added
        ys.append(torch.einsum("bhpn,bn->bhp", h, c[:, t]))
    return torch.stack(ys[::-1] if reverse else ys, 1).flatten(2)


def shift(x: Tensor) -> Tensor:
    """Each token gets what the one before it had."""
    return F.pad(x, (0, 0, 1, 0))[:, :-1]


def by_flips(scan: Scan, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    behind = scan(*(z.flip(1) if z.dim() == 3 else z for z in (x, dt, a, b, c)))
    return shift(scan(x, dt, a, b, c)) + shift(behind).flip(1) + d * x


def by_reversed_loop(scan: Scan, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    ahead = F.pad(scan(x, dt, a, b, c, reverse=True), (0, 0, 0, 1))[:, 1:]
    return shift(scan(x, dt, a, b, c)) + ahead + d * x


def in_one_batch(scan: Scan, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Both directions by one loop: as many scans as layers."""
    x2, dt2, b2, c2 = (torch.cat([z, z.flip(1)]) for z in (x, dt, b, c))
    forth, back = shift(scan(x2, dt2, a, b2, c2)).chunk(2)
    return forth + back.flip(1) + d * x


class Hydra(nn.Module):
    """The mixer: projections, a convolution that looks both ways, the two scans, a gate."""

    def __init__(self, mix: Any, scan: Scan) -> None:
        super().__init__()
        self.mix, self.scan = mix, scan
        self.inner = nn.Linear(SIZE, 2 * SIZE)
        self.conv = nn.Conv1d(SIZE, SIZE, 3, padding=1, groups=SIZE)
        self.to_scan = nn.Linear(SIZE, SIZE + 2 * STATE)
        self.log_rate = nn.Parameter(torch.rand(SIZE, STATE))
        self.d = nn.Parameter(torch.ones(SIZE))
        self.outer = nn.Linear(SIZE, SIZE)

    def forward(self, u: Tensor) -> Tensor:
        x, z = self.inner(u).chunk(2, -1)
        x = F.silu(self.conv(x.mT).mT)
        dt, b, c = self.to_scan(x).split([SIZE, STATE, STATE], -1)
        y = self.mix(self.scan, x, F.softplus(dt), -self.log_rate.exp(), b, c, self.d)
        return u + self.outer(y * F.silu(z))


def quasi_separable(scan: Scan, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """By the matrix itself: entry (i, j) of channel p is c_i . decays between i and j . dt_j b_j."""
    if scan is by_heads:
        per_head = SIZE // HEADS
        dt = dt[..., :HEADS].repeat_interleave(per_head, -1)
        a = a[:HEADS, :1].repeat_interleave(per_head, 0).expand(SIZE, STATE)
    steps, n = (dt[..., None] * a).cumsum(1), x.shape[1]
    rows = []
    for i in range(n):
        row = d * x[:, i]
        for j in set(range(n)) - {i}:
            # Token j decays from the next one on, and is read one token before it comes to i.
            read = i - 1 if j < i else i + 1
            log = steps[:, i - 1] - steps[:, j] if j < i else steps[:, j - 1] - steps[:, i]
            row = row + ((c[:, read] * b[:, j])[:, None] * log.exp()).sum(-1) * dt[:, j] * x[:, j]
        rows.append(row)
    return torch.stack(rows, 1)


@pytest.mark.parametrize("lowering", ["eager", pytest.param("auto", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scan", [selective, by_heads])
@pytest.mark.parametrize(("mix", "scans"), [(by_flips, 2), (by_reversed_loop, 2), (in_one_batch, 1)])
def test_both_scans_are_recognised_and_train(mix: Any, scans: int, scan: Scan, lowering: str) -> None:
    torch.manual_seed(0)
    layer, u = Hydra(mix, scan), torch.randn(BATCH, TOKENS, SIZE)
    weights = list(layer.parameters())
    got, report = run_compiled(layer, u, lowering=lowering, outline=False)
    assert report.ops["selective_scan" if scan is selective else "linear_attention"] == scans
    found = torch.autograd.grad(got.square().sum(), weights)
    layer.double()
    want = layer(u.double())
    exact = torch.autograd.grad(want.square().sum(), list(layer.parameters()))
    assert (got - want).abs().max() <= 5e-6 * want.abs().max()
    for a, b in zip(found, exact, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize("scan", [selective, by_heads])
def test_the_three_spellings_are_one_matrix(scan: Scan) -> None:
    """Without the compiler: that what the tests above compare with is Hydra's mixer."""
    torch.manual_seed(0)
    x, b, c = (torch.randn(BATCH, TOKENS, n, dtype=torch.float64) for n in (SIZE, STATE, STATE))
    dt, a, d = torch.rand_like(x), -torch.rand(SIZE, STATE, dtype=torch.float64), torch.randn(SIZE).double()
    want = quasi_separable(scan, x, dt, a, b, c, d)
    for mix in (by_flips, by_reversed_loop, in_one_batch):
        torch.testing.assert_close(mix(scan, x, dt, a, b, c, d), want)
