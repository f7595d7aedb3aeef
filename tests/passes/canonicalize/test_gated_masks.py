"""Gates of tokens in a mask: recognised in the spellings of models, trained; look-alikes stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from effopt.compile import record
from tests.passes.canonicalize.gated_masks import SPELLINGS, apart, differences, inputs, segment_sum, segments
from tests.passes.conftest import run_compiled


def recognised(report: Any) -> int:
    return int(report.counts["recognize-linear-attention"])


def near(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", SPELLINGS)
def test_inference_and_gradients(name: str) -> None:
    torch.manual_seed(0)
    given = inputs()
    with torch.no_grad():
        out, report = run_compiled(SPELLINGS[name], *given)
        near(out, SPELLINGS[name](*(x.double() for x in given)))
    assert recognised(report) == (2 if name == "normalised" else 1), report.rejected
    leaves = [x.clone().requires_grad_() for x in given]
    exact = [x.double().requires_grad_() for x in given]
    out, report = run_compiled(SPELLINGS[name], *leaves)
    assert recognised(report) >= 1
    found = [
        torch.autograd.grad(y.square().sum(), xs, allow_unused=True)
        for y, xs in ((out, leaves), (SPELLINGS[name](*exact), exact))
    ]
    for got, wanted in zip(*found, strict=True):
        if wanted is None:
            assert got is None or not got.any()
        else:
            near(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_are_no_worse_than_the_original(dtype: torch.dtype) -> None:
    given = inputs(dtype=dtype)
    exact = segments(*(x.double() for x in given))
    with torch.no_grad():
        out, report = run_compiled(segments, *given)
    assert recognised(report) == 1, report.rejected
    own = float((segments(*given) - exact).abs().max())
    assert float((out - exact).abs().max()) <= own + torch.finfo(dtype).eps * float(exact.abs().max())


def test_a_gate_that_forgets_all() -> None:
    """Sums with -inf are exact in both; differences of them are NaN in the original, and forget here."""
    given = inputs()
    given[3][:, :, 9] = -torch.inf
    with torch.no_grad():
        out, report = run_compiled(segments, *given)
        wanted = segments(*(x.double() for x in given))
        assert recognised(report) == 1
        near(out, wanted)
        other, report = run_compiled(SPELLINGS["filled"], *given)
        assert recognised(report) == 1
        near(other, wanted)


def test_strong_gates_keep_the_digits_of_weak_ones() -> None:
    """A cumulative sum of 1e6 has no digits left for what is added to it."""
    given = inputs()
    given[3][:, :, 3] = -1e6
    with torch.no_grad():
        out, report = run_compiled(SPELLINGS["filled"], *given)
    assert recognised(report) == 1
    near(out, SPELLINGS["filled"](*(x.double() for x in given)))


def test_dynamic_lengths() -> None:
    compiled = torch.compile(segments, backend="effopt", options={"lowering": "eager"}, dynamic=True)
    with torch.no_grad(), record() as report:
        for t in (21, 9, 70):
            given = inputs(t)
            near(compiled(*given), segments(*(x.double() for x in given)))
    assert recognised(report) == 1, report.rejected


Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def _by(decay: Callable[[Tensor, Tensor], Tensor]) -> Attend:
    return lambda q, k, v, g, dt: (q @ k.mT * decay(g, dt)) @ v


def _behind(x: Tensor) -> Tensor:
    return x.masked_fill(apart(x.shape[-1]) < 0, -torch.inf).exp()


def _halves(g: Tensor, dt: Tensor) -> Tensor:
    total = g.cumsum(-1)
    return (total.exp()[..., :, None] * (-total).exp()[..., None, :]).tril()


def _two_sums(g: Tensor, dt: Tensor) -> Tensor:
    return _behind(g.cumsum(-1)[..., :, None] - dt.cumsum(-1)[..., None, :])


def _of_channels(g: Tensor, dt: Tensor) -> Tensor:
    total = g.cumsum(1)
    return _behind(total[..., :, None] - total[..., None, :])


def _shifted(g: Tensor, dt: Tensor) -> Tensor:
    total = g.cumsum(-1)
    return _behind(total[..., :, None] - (total - g)[..., None, :])


def _from_the_first(g: Tensor, dt: Tensor) -> Tensor:
    return _behind(g.cumsum(-1)[..., :, None].expand(*g.shape, g.shape[-1]))


def _ahead(g: Tensor, dt: Tensor) -> Tensor:
    """Sums of the tokens ahead of the query: 0 behind it."""
    t = g.shape[-1]
    total = g[..., None, :].expand(*g.shape, t).masked_fill(apart(t) >= 0, 0).cumsum(-1)
    return _behind(total)


def _longer(g: Tensor, dt: Tensor) -> Tensor:
    total = torch.cat([g, dt], -1).cumsum(-1)
    total = total[..., 1 : g.shape[-1] + 1]
    return _behind(total[..., :, None] - total[..., None, :])


def _own(g: Tensor, dt: Tensor) -> Tensor:
    return segment_sum(g).exp() * dt[..., :, None]


def _rounded(g: Tensor, dt: Tensor) -> Tensor:
    total = g.bfloat16().cumsum(-1)
    return _behind((total[..., :, None] - total[..., None, :]).float())


def _whole(g: Tensor, dt: Tensor) -> Tensor:
    total = (g * 8).long().cumsum(-1)
    return _behind((total[..., :, None] - total[..., None, :]).float())


REFUSED: dict[str, tuple[Attend, str]] = {
    "off by one": (_by(lambda g, dt: segment_sum(g, 0).exp()), "off by one"),
    "off by one the other way": (_by(lambda g, dt: segment_sum(g, -2).exp()), "not of the tokens behind"),
    "a product hides overflow": (_by(lambda g, dt: differences(g).exp() * (apart(21) >= 0)), "may overflow"),
    "no mask": (_by(lambda g, dt: differences(g).exp()), "every query sees every key"),
    "halves of a decay": (_by(_halves), "from the first token on"),
    "two sums": (_by(_two_sums), "no difference of one cumulative sum"),
    "sums over heads": (_by(_of_channels), "no difference of one cumulative sum at two tokens"),
    "a sum without its last": (_by(_shifted), ""),
    "from the first token": (_by(_from_the_first), "from the first token on"),
    "tokens ahead": (_by(_ahead), ""),
    "gates of later tokens": (_by(_longer), "is not of the tokens behind the key"),
    "a factor of queries": (_by(_own), "not known to be causal"),
    "sums that are rounded": (_by(_rounded), "is rounded to torch.bfloat16"),
    "whole numbers": (_by(_whole), ""),
    "the diagonal is hidden": (_by(lambda g, dt: segment_sum(g).exp().tril(-1)), "its own key is hidden"),
    "turned": (lambda q, k, v, g, dt: (q @ k.mT * segment_sum(g).exp()).mT @ v, "change places"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_look_alikes(name: str) -> None:
    attend, reason = REFUSED[name]
    given = inputs()
    with torch.no_grad():
        out, report = run_compiled(attend, *given)
        torch.testing.assert_close(out, attend(*given), equal_nan=True)
    assert not recognised(report)
    assert not any("raised" in r.reason for r in report.rejected), report.rejected
    reasons = [r.reason for r in report.rejected if r.pass_name == "recognize-linear-attention"]
    assert not reason or any(reason in r for r in reasons), reasons
