"""The selective scan in chunks of steps: values, gradients, sizes, and a state that is carried on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effopt.backends import chunked_scan as scans
from effopt.backends.chunked_scan import LOWERINGS, chunked_scan
from effopt.graph import ops
from effopt.target import target_of
from effopt.testing import check_lowering

(CHUNKS,) = LOWERINGS


def operands(b: int, d: int, n: int, t: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """u, delta, a, b, c, start."""
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=dtype)  # noqa: E731
    delta = torch.nn.functional.softplus(draw(b, d, t))
    return [draw(b, d, t), delta, -draw(d, n).exp(), draw(b, n, t), draw(b, n, t), draw(b, d, n)]


def test_samples_in_every_dtype() -> None:
    done = check_lowering(CHUNKS)
    assert done.compared == done.gradients == 48
    assert not done.refused


@pytest.mark.parametrize(("b", "t"), [(0, 3), (2, 0), (1, 1)])
def test_empty_and_single_sizes(b: int, t: int) -> None:
    given = operands(b, 3, 4, t)
    for got, wanted in zip(chunked_scan(*given), ops.selective_scan.reference(*given), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("steps", [1, 2, 5, 64])
def test_the_length_of_chunks_changes_nothing(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [x.requires_grad_() for x in operands(2, 3, 4, 11)]
    wanted = ops.selective_scan.reference(*given)
    monkeypatch.setattr(scans, "_MOST_STEPS", steps)
    got = chunked_scan(*given)
    upstream = [torch.randn_like(x) for x in wanted]
    for x, y in zip(torch.autograd.grad(got, given, upstream), torch.autograd.grad(wanted, given, upstream),
                    strict=True):  # fmt: skip
        torch.testing.assert_close(x, y)


def test_gradients_by_finite_differences() -> None:
    given = [x.requires_grad_() for x in operands(1, 2, 3, 5)]
    assert torch.autograd.gradcheck(chunked_scan, given)


def test_one_of_two_results_may_go_unused() -> None:
    given = [x.requires_grad_() for x in operands(1, 2, 3, 70)]
    for index in (0, 1):
        found, wanted = (
            torch.autograd.grad(scan(*given)[index].sum(), given, allow_unused=True, materialize_grads=True)
            for scan in (chunked_scan, ops.selective_scan.reference)
        )
        torch.testing.assert_close(found, wanted)


def test_strong_decay_underflows_and_nothing_is_divided_by_it() -> None:
    u, delta, a, b, c, _ = operands(1, 3, 4, 200, torch.float32)
    given = [x.requires_grad_() for x in (u, delta * 1e4, a, b, c)]
    y, last = chunked_scan(*given)
    gradients = torch.autograd.grad(y.sum() + last.sum(), given)
    assert all(bool(x.isfinite().all()) for x in (y, last, *gradients))
    exact, _ = ops.selective_scan.reference(*(x.detach().double() for x in given))
    torch.testing.assert_close(y.detach().double(), exact, rtol=2e-5, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_goes_on_from_its_step_in_its_channel(value: float) -> None:
    given = operands(2, 3, 4, 100, torch.float32)
    given[0][1, 2, 70] = value
    y, last = chunked_scan(*given)
    wanted, wanted_last = ops.selective_scan.reference(*given)
    assert torch.equal(y.isfinite(), wanted.isfinite())
    assert torch.equal(last.isnan(), wanted_last.isnan())
    assert bool(y[1, 2, :70].isfinite().all())
    assert not bool(y[1, 2, 70].isfinite())


@given(st.integers(0, 2), st.integers(1, 5), st.integers(1, 4), st.integers(0, 150), st.integers(0, 150))
@settings(max_examples=25, deadline=None)
def test_two_calls_that_carry_the_state_are_one(b: int, d: int, n: int, first: int, second: int) -> None:
    *rest, start = operands(b, d, n, first + second)
    u, delta, a, into, out = rest

    def scan(steps: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        return chunked_scan(*(x[..., steps] for x in (u, delta)), a, into[..., steps], out[..., steps], state)

    whole, last = chunked_scan(*rest, start)
    before, state = scan(slice(0, first), start)
    after, state = scan(slice(first, None), state)
    torch.testing.assert_close(torch.cat([before, after], -1), whole)
    torch.testing.assert_close(state, last)


def test_refusals() -> None:
    bound: dict[str, Any] = ops.selective_scan.bind(tuple(operands(1, 2, 3, 4)), {})
    assert CHUNKS.supports(target_of(torch.device("cpu")), bound) is None
    with pytest.raises(ValueError, match=r"delta: expected \[1, 2, 4\], got \[1, 2, 3\]"):
        chunked_scan(bound["u"], bound["delta"][..., :3], bound["a"], bound["b"], bound["c"])
