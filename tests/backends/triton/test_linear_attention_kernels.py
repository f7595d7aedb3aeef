"""Linear attention by Triton kernels against the op's reference in float64: values, states, gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from effopt.backends.base import choose
from effopt.backends.chunked_linear_attention import LOWERINGS as CHUNKED
from effopt.backends.reference import reference_lowering
from effopt.backends.triton.linear_attention_backward import LINEAR_ATTENTION
from effopt.graph import ops
from effopt.graph.ops import Sample
from tests.backends.triton.calls import H100, assert_near, assert_values, double
from tests.backends.triton.linear_attention_calls import assert_gradients, call_of

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


CASES = [(1, 16, 16, "none", False), (1, 64, 40, "head", True), (65, 17, 73, "head", True),
         (33, 128, 16, "token", False), (100, 16, 63, "token", True)]  # fmt: skip


@every_dtype
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: Any, dtype: torch.dtype, device: torch.device) -> None:
    assert_values(LINEAR_ATTENTION, call_of(dtype, device, *case))


@every_dtype
@pytest.mark.parametrize("case", CASES[2:], ids=str)
def test_gradients(case: Any, dtype: torch.dtype, device: torch.device) -> None:
    assert_gradients(call_of(dtype, device, *case), dtype)


@pytest.mark.parametrize("decay", [-math.inf, -3000.0, 0.0])
def test_resets_take_no_digits_of_what_follows(decay: float, device: torch.device) -> None:
    sample = call_of(torch.float32, device, 40, 16, 16, "token", True)
    sample.kwargs["decay"].mul_(1e-3)[..., ::5] = decay
    assert_values(LINEAR_ATTENTION, sample)
    if math.isfinite(decay):
        assert_gradients(sample, torch.float32)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, of the interpreter
@every_dtype
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_not_finite_spoils_no_token_before_it(
    number: float, dtype: torch.dtype, device: torch.device
) -> None:
    for operand in range(3):
        sample = call_of(dtype, device, 20, 16, 16, "token", True)
        sample.args[operand][0, 1, 11, 2] = number
        out, last = LINEAR_ATTENTION.call(*sample.args, **sample.kwargs)
        exact = ops.linear_attention.reference(*map(double, sample.args), **sample.kwargs)
        assert torch.equal(out.isfinite(), exact[0].isfinite())
        assert torch.equal(last.isfinite(), exact[1].isfinite())
        assert_near(out[out.isfinite()], exact[0][out.isfinite()], dtype)


def test_layouts(device: torch.device) -> None:
    """Tokens before heads, slices of one projection, a decay expanded over the batch."""
    q, k, v = torch.randn(2, 20, 3, 48, device=device).split(16, -1)
    decay = -torch.rand(1, 3, 1, device=device).expand(2, 3, 20)
    operands = tuple(x.transpose(1, 2) for x in (q, k, v))
    assert_values(LINEAR_ATTENTION, Sample(operands, {"scale": 0.3, "decay": decay}))


def test_no_tokens(device: torch.device) -> None:
    sample = call_of(torch.float32, device, 0, 16, 16, "token", True)
    assert_values(LINEAR_ATTENTION, sample)


def test_two_calls_are_one(device: torch.device) -> None:
    whole = call_of(torch.float32, device, 50, 16, 16, "token", True)
    state, parts = whole.kwargs["state"], []
    for part in (slice(0, 37), slice(37, 38), slice(38, 50)):
        decay = whole.kwargs["decay"][..., part]
        own = {**whole.kwargs, "decay": decay, "state": state}
        out, state = LINEAR_ATTENTION.call(*(x[:, :, part] for x in whole.args), **own)
        parts.append(out)
    wanted = LINEAR_ATTENTION.call(*whole.args, **whole.kwargs)
    torch.testing.assert_close((torch.cat(parts, 2), state), wanted, rtol=1e-5, atol=1e-5)


def test_opcheck(device: torch.device) -> None:
    sample = call_of(torch.float32, device, 9, 16, 16, "head", True)
    given = [x.requires_grad_() for x in (*sample.args, sample.kwargs["decay"], sample.kwargs["state"])]
    torch.library.opcheck(torch.ops.effopt_triton.linear_attention.default, (*given, 0.3))


def operands(t: int = 64, d: int = 64, dtype: torch.dtype = torch.bfloat16, **kwargs: Any) -> Any:
    q = torch.empty(2, 8, t, d, dtype=dtype, device="meta")
    return ops.linear_attention.bind((q, q, q), {"scale": 1.0, **kwargs})


def meta(*sizes: int) -> Tensor:
    return torch.empty(sizes, device="meta")


REFUSED = {
    "long heads": (operands(d=256), "at most 128"),
    "float64": (operands(dtype=torch.float64), "up to float32"),
    "nothing": (operands(t=0), "nothing to launch"),
    "another state": (operands(state=meta(2, 8, 64, 7)), "does not end in"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusal(name: str) -> None:
    bound, reason = REFUSED[name]
    assert reason in (LINEAR_ATTENTION.supports(H100, bound) or "")


@pytest.mark.parametrize("training", [False, True])
def test_choice_on_a_gpu(training: bool) -> None:
    bound = operands(t=4096, decay=meta(8))
    result = (bound["query"], meta(2, 8, 64, 64))
    lowerings = [LINEAR_ATTENTION, *CHUNKED, reference_lowering(ops.linear_attention)]
    assert choose(lowerings, H100, bound, result, training).lowering.name == "triton"
    by_channel = operands(t=4096, decay=meta(2, 8, 4096, 64))
    assert choose(lowerings, H100, by_channel, result, training).lowering.name == "triton"
