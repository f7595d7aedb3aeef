"""Loops that only look like a selective scan stay as they are; operands that fit in no other way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from effopt.graph import ops
from tests.passes.canonicalize.test_recognize_selective_scan import (
    NAME,
    Read,
    inputs,
    looped,
    product,
    run,
    weighted,
)


def refused(loop: Callable[..., Any], given: list[Tensor]) -> list[str]:
    """Why a loop was left alone, once its results were seen to be right."""
    with torch.no_grad():
        got, report = run(lambda: loop(*given), lowering="eager", pipeline=NAME)
    torch.testing.assert_close(got, loop(*given), rtol=2e-6, atol=2e-6)
    assert report.ops["selective_scan"] == 0
    assert not report.faults
    return [r.reason for r in report.rejected if r.pass_name == NAME]


@pytest.mark.parametrize(
    ("read", "reason"),
    [
        (lambda h, c, t: (h.to(torch.int32) * c[:, None, :, t]).sum(-1), "rounded to torch.int32"),
        (lambda h, c, t: (h.half().float() * c[:, None, :, t]).sum(-1), "rounded to torch.float16"),
        (lambda h, c, t: (h.half().float() @ c[:, :, t, None])[:, :, 0], "rounded to torch.float16"),
        (lambda h, c, t: weighted(h, c, t).bfloat16().float(), "rounded to torch.bfloat16"),
        (lambda h, c, t: weighted(h, c, t).bfloat16().half(), "rounded to torch.bfloat16"),
        (lambda h, c, t: weighted(h, c, t).to(torch.float8_e5m2).float(), "rounded to torch.float8_e5m2"),
        (lambda h, c, t: weighted(h, c, t).int(), "rounded to torch.int32"),
        (
            lambda h, c, t: (h * c[:, None, :, t]).sum(-1, dtype=torch.float16).float(),
            "sums in torch.float16",
        ),
    ],
)
def test_a_read_out_that_is_rounded_is_refused(read: Read, reason: str) -> None:
    (why,) = refused(lambda *given: looped(*given, read), inputs())
    assert reason in why


def test_large_states_read_out_as_integers_are_refused() -> None:
    """At this size a rewrite is not run to check it: the proof alone stands between it and a wrong result."""
    given = inputs(u=(4, 768, 48), delta=(4, 768, 48), a=(768, 16), b=(4, 16, 48), c=(4, 16, 48))
    read = lambda h, c, t: (h.to(torch.int32) * c[:, None, :, t]).sum(-1)  # noqa: E731
    assert refused(lambda *x: looped(*x, read), given)


@pytest.mark.parametrize(
    ("read", "other", "reason"),
    [
        (product, {"c": (1, 5, 4)}, "1 of 2 along b"),
        (weighted, {"c": (1, 5, 4)}, "not by (b, n, t)"),
        (product, {"u": (1, 3, 4), "delta": (1, 3, 4), "b": (1, 5, 4)}, "2 of 1 along b"),
        (weighted, {"u": (1, 3, 4), "delta": (1, 3, 4), "b": (1, 5, 4)}, "its read-out broadcasts its state"),
        (weighted, {"a": (3, 1), "b": (2, 1, 4)}, "its read-out broadcasts its state"),
        (weighted, {"b": (2, 1, 4)}, "is no product"),
        (lambda h, c, t: (h * c[:, :, None, :, t]).sum(-1), {"c": (7, 2, 5, 4)}, "broadcasts its state"),
    ],
)
def test_broadcast_operands_are_refused(read: Read, other: dict[str, tuple[int, ...]], reason: str) -> None:
    (why,) = refused(lambda *given: looped(*given, read), inputs(**other))
    assert reason in why


@pytest.mark.parametrize(
    "other",
    [
        {"u": (1, 3, 4), "delta": (1, 3, 4), "b": (1, 5, 4)},
        {"u": (2, 1, 4), "delta": (2, 1, 4), "a": (1, 5)},
        {"a": (3, 1), "b": (2, 1, 4)},
    ],
)
def test_what_is_added_and_decays_has_every_axis_of_a_given_state(other: dict[str, tuple[int, ...]]) -> None:
    def loop(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        h, ys = torch.ones(2, 3, 5), []
        for t in range(u.shape[2]):
            length = delta[:, :, t, None]
            h = torch.exp(length * a) * h + length * u[:, :, t, None] * b[:, None, :, t]
            ys.append(weighted(h, c, t))
        return torch.stack(ys, -1)

    (why,) = refused(loop, inputs(**other))
    assert "is exp of" in why or "is no product" in why


def test_the_fake_kernel_knows_every_shape() -> None:
    given = [*inputs(), torch.zeros(2, 3, 5)]
    y, last = ops.selective_scan.fake(*given)
    assert (y.shape, last.shape) == ((2, 3, 4), (2, 3, 5))
    for i, name in enumerate(("delta", "a", "b", "c", "start"), 1):
        with pytest.raises(ValueError, match=rf"^{name}: expected .*, got \[1, "):
            ops.selective_scan.fake(*given[:i], given[i][:1], *given[i + 1 :])


def test_a_state_in_float64_is_scanned_in_float64() -> None:
    """Read out in float32, by a float32 input: neither tells of the state."""
    given = inputs()
    given[1] = given[1].double()

    def loop(*given: Tensor) -> tuple[Tensor, Tensor]:
        return looped(*given, lambda h, c, t: weighted(h, c, t).float())

    exact = loop(given[0].double(), *given[1:])[1]
    with torch.no_grad():
        (y, last), report = run(lambda: loop(*given), lowering="eager", pipeline=NAME)
    assert report.ops["selective_scan"] == 1
    assert (y.dtype, last.dtype) == (torch.float32, torch.float64)
    assert (last - exact).abs().max() <= 1e-12 * exact.abs().max()
