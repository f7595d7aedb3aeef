"""The kernels of the selective scan against the reference in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effopt.backends.triton import selective_scan as kernels
from effopt.backends.triton.selective_scan import SELECTIVE_SCAN
from effopt.graph import ops
from effopt.graph.ops import Sample
from tests.backends.triton.calls import assert_gradients, assert_values, wanting_gradients


def call(b: int, d: int, n: int, t: int, dtype: torch.dtype, device: torch.device, start: bool) -> Sample:
    draw = lambda *shape: torch.randn(*shape, dtype=dtype, device=device)  # noqa: E731
    delta = torch.nn.functional.softplus(draw(b, d, t) - 1)
    given = [draw(b, d, t), delta, -draw(d, n).exp(), draw(b, n, t), draw(b, n, t)]
    return Sample((*given, *([draw(b, d, n)] if start else [])), {})


SIZES = [(1, 1, 1, 1), (2, 5, 3, 33), (1, 70, 16, 4), (1, 3, 100, 5)]
"""One of everything; two chunks; two programs a batch entry; a state that is padded."""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values(size: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    sample = call(*size, dtype, device, start=size[0] == 2)
    assert_values(SELECTIVE_SCAN, sample)


@pytest.mark.parametrize("size", SIZES)
def test_gradients(size: tuple[int, int, int, int], device: torch.device) -> None:
    sample = call(*size, torch.float32, device, start=size[0] == 2)
    assert_gradients(SELECTIVE_SCAN, wanting_gradients(sample))


@pytest.mark.parametrize("unused", [(0,), (1,)])
def test_gradients_of_one_result(unused: tuple[int, ...], device: torch.device) -> None:
    assert_gradients(SELECTIVE_SCAN, wanting_gradients(call(1, 3, 4, 5, torch.float64, device, True)), unused)


def test_operands_of_any_strides(device: torch.device) -> None:
    args = call(2, 5, 3, 7, torch.float32, device, True).args
    turned = [x.mT.contiguous().mT for x in args]
    assert_values(SELECTIVE_SCAN, Sample(tuple(turned), {}))


# The interpreter computes with NumPy, which warns of inf * 0.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_not_finite_stays_in_its_channel(device: torch.device) -> None:
    args: list[Tensor] = list(call(1, 5, 3, 40, torch.float32, device, True).args)
    args[0][0, 2, 7] = float("inf")
    y, _ = kernels.selective_scan(*args)
    wanted, _ = ops.selective_scan.reference(*args)
    assert torch.equal(y.isfinite(), wanted.isfinite())
    assert not bool(y[0, 2, 7].isfinite())


def test_a_state_that_no_program_holds_is_refused(device: torch.device) -> None:
    args = call(1, 1, kernels.MAX_STATE + 1, 2, torch.float32, device, False).args
    with pytest.raises(ValueError, match="at most 256 numbers of state"):
        kernels.selective_scan(*args)
