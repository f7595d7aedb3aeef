"""Linear attention with gates of channels by Triton kernels against float64; decode steps with any decay."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from effopt.backends.base import choose
from effopt.backends.chunked_linear_attention import LOWERINGS as CHUNKED
from effopt.backends.reference import reference_lowering
from effopt.backends.triton import (
    linear_attention,
    linear_attention_backward,
    linear_attention_channels,
    linear_attention_step,
)
from effopt.backends.triton.linear_attention_backward import LINEAR_ATTENTION
from effopt.graph import ops
from effopt.graph.ops import Sample
from tests.backends.triton.calls import H100, assert_near, assert_values, double, gradients
from tests.backends.triton.linear_attention_calls import assert_gradients, call_of

CASES = [(1, 16, 64), (15, 64, 16), (17, 1, 24), (17, 16, 1), (33, 24, 16)]
"""Tokens, channels, columns: a step, one chunk, a head of one channel, a value of one, blocks not full."""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    assert_values(LINEAR_ATTENTION, call_of(dtype, device, *case, "channel", case[0] != 15, b=1))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(case: tuple[int, int, int], device: torch.device) -> None:
    assert_gradients(call_of(torch.float32, device, *case, "channel", case[0] != 15, b=1), torch.float32)


@pytest.mark.parametrize("case", CASES[-2:], ids=str)
def test_gradients_in_bfloat16(case: tuple[int, int, int], device: torch.device) -> None:
    """Whose chunks are twice as long."""
    assert_gradients(call_of(torch.bfloat16, device, *case, "channel", True, b=1), torch.bfloat16)


def test_two_blocks_of_columns(device: torch.device) -> None:
    """More than one program has."""
    dv = linear_attention_channels.COLUMNS_FLOAT32 + 2
    assert_values(LINEAR_ATTENTION, call_of(torch.float32, device, 17, 16, dv, "channel", True, b=1))


@pytest.mark.parametrize("t", [1, 3])
def test_long_heads(t: int, device: torch.device) -> None:
    """Longer than with other decays, which hold all channels at once."""
    assert_values(LINEAR_ATTENTION, call_of(torch.float32, device, t, 130, 5, "channel", True, b=1))


@pytest.mark.parametrize("strong", [-math.inf, -3000.0])
def test_strong_gates_take_no_digits_of_weak_ones(strong: float, device: torch.device) -> None:
    """Beside steps of 1e-3, in some channels and at some tokens; -30 leaves what float32 still has."""
    sample = call_of(torch.float32, device, 33, 5, 7, "channel", True, b=1)
    gate = sample.kwargs["decay"].mul_(1e-3)
    gate[:, :, ::5] = gate[:, 1, :, 0] = strong
    gate[:, 0, 2::3, 1:3] = gate[:, 0, :, 3] = -30.0
    assert_values(LINEAR_ATTENTION, sample)
    assert_gradients(sample, torch.float32)


def test_a_gate_that_forgets_all_gets_no_gradient(device: torch.device) -> None:
    sample = call_of(torch.float32, device, 20, 5, 7, "channel", True, b=1)
    gate = sample.kwargs["decay"]
    gate[:, :, 3::4, 1] = -math.inf
    out, last = LINEAR_ATTENTION.call(*sample.args, **{**sample.kwargs, "decay": gate.requires_grad_()})
    (found,) = torch.autograd.grad(out.sum() + last.sum(), gate)
    assert bool(found.isfinite().all())
    assert bool((found[:, :, 3::4, 1] == 0).all())
    assert bool((found[:, :, :, 0] != 0).all())


@pytest.mark.parametrize("unused", [0, 1])
def test_gradients_of_one_result(unused: int, device: torch.device) -> None:
    sample = call_of(torch.float32, device, 18, 5, 7, "channel", True, b=1)
    leaves = [x.requires_grad_() for x in (*sample.args, sample.kwargs["decay"], sample.kwargs["state"])]
    upstream = [torch.randn_like(x) for x in ops.linear_attention.reference(*sample.args, **sample.kwargs)]

    def call(of: Any) -> Any:
        return lambda *a: of(*a[:3], scale=0.3, decay=a[3], state=a[4])[1 - unused]

    got = gradients(call(LINEAR_ATTENTION.call), leaves, {}, [upstream[1 - unused]])
    wide = [upstream[1 - unused].double()]
    exact = gradients(call(ops.linear_attention.reference), map(double, leaves), {}, wide)
    for g, e in zip(got, exact, strict=True):
        assert_near(g, torch.zeros_like(g).double() if e is None else e, torch.float32)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, of the interpreter
@pytest.mark.parametrize("number", [math.nan, math.inf])
@pytest.mark.parametrize("operand", ["query", "key", "value", "gate"])
def test_what_is_not_finite_spoils_no_token_before_it(
    operand: str, number: float, device: torch.device
) -> None:
    sample = call_of(torch.float32, device, 18, 5, 7, "channel", True, b=1)
    given = dict(zip(("query", "key", "value"), sample.args, strict=True)) | {"gate": sample.kwargs["decay"]}
    given[operand][0, 1, 11, 2] = number
    found = LINEAR_ATTENTION.call(*sample.args, **sample.kwargs)
    exact = ops.linear_attention.reference(*map(double, sample.args), **sample.kwargs)
    assert bool(found[0][0, 1, :11].isfinite().all())
    assert not bool(found[0][0, 1, 11].isfinite().all())
    for got, wanted in zip(found, exact, strict=True):
        assert torch.equal(got.isfinite(), wanted.isfinite())
        assert_near(got[got.isfinite()], wanted[got.isfinite()], torch.float32)


LAYOUTS = {
    "tokens before heads": lambda gate: gate.transpose(1, 2).contiguous().transpose(1, 2),
    "every other channel": lambda gate: gate.repeat_interleave(2, -1)[..., ::2],
    "one for all heads": lambda gate: gate[:, :1].expand(gate.shape),
    "bfloat16": lambda gate: gate.bfloat16(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, device: torch.device) -> None:
    """Slices of one projection, tokens before heads; and gates of any strides and dtype."""
    q, k, v = torch.randn(2, 6, 2, 9, device=device).split(3, -1)
    gate = LAYOUTS[layout](-torch.rand(2, 2, 6, 3, device=device))
    sample = Sample(tuple(x.transpose(1, 2) for x in (q, k, v)), {"scale": 0.3, "decay": gate})
    assert_values(LINEAR_ATTENTION, sample)
    leaf = gate.detach().requires_grad_()
    calls = ((LINEAR_ATTENTION.call, sample.args), (ops.linear_attention.reference, map(double, sample.args)))
    got, exact = (
        torch.autograd.grad(of(*operands, scale=0.3, decay=leaf)[0].sum(), leaf)[0] for of, operands in calls
    )
    assert_near(got, exact.double(), gate.dtype)


def test_two_calls_are_one(device: torch.device) -> None:
    whole = call_of(torch.float32, device, 35, 5, 7, "channel", True, b=1)
    state, parts = whole.kwargs["state"], []
    for part in (slice(0, 17), slice(17, 18), slice(18, 35)):
        own = {**whole.kwargs, "decay": whole.kwargs["decay"][:, :, part], "state": state}
        out, state = LINEAR_ATTENTION.call(*(x[:, :, part] for x in whole.args), **own)
        parts.append(out)
    wanted = LINEAR_ATTENTION.call(*whole.args, **whole.kwargs)
    torch.testing.assert_close((torch.cat(parts, 2), state), wanted, rtol=1e-5, atol=1e-5)


def test_gates_of_another_shape(device: torch.device) -> None:
    sample = call_of(torch.float32, device, 9, 5, 7, "channel", b=1)
    with pytest.raises(
        ValueError, match=r"expected \[h\], \[b, h, t\] or \[b, h, t, d\], got \[1, 2, 9, 4\]"
    ):
        LINEAR_ATTENTION.call(*sample.args, **{**sample.kwargs, "decay": sample.kwargs["decay"][..., :4]})


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("kind", ["none", "head", "token", "channel"])
def test_a_decode_step_is_one_kernel(
    kind: str, state: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which reads the state once, and writes it once; of more columns than a program has."""
    launched = []
    for module in (linear_attention, linear_attention_step):
        launch = module.launch
        monkeypatch.setattr(
            module, "launch", lambda *a, _run=launch, **k: (launched.append(a[0]), _run(*a, **k))
        )
    assert_values(LINEAR_ATTENTION, call_of(torch.float32, device, 1, 24, 33, kind, state))
    assert launched == [linear_attention_step.step_kernel]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, of the interpreter
def test_a_step_spoils_columns_that_are_not_finite_alone(device: torch.device) -> None:
    sample = call_of(torch.float32, device, 1, 5, 7, "channel", True, b=1)
    sample.args[2][0, 1, 0, 3] = math.inf
    out, last = LINEAR_ATTENTION.call(*sample.args, **sample.kwargs)
    expected = torch.arange(7, device=device) != 3
    assert torch.equal(out[0, 1, 0].isfinite(), expected)
    assert torch.equal(last[0, 1].isfinite(), expected.expand(5, 7))
    assert bool(last[0, 1, :, 3].isinf().all())


def bound_of(b: int, t: int, d: int, by_channel: bool) -> Any:
    q = torch.empty(b, 32, t, d, dtype=torch.bfloat16, device="meta")
    decay = torch.empty(b, 32, t, d, device="meta") if by_channel else None
    state = torch.empty(b, 32, d, d, device="meta") if t == 1 else None
    operands = ops.linear_attention.bind((q, q, q), {"scale": 1.0, "decay": decay, "state": state})
    return operands, (q, torch.empty(b, 32, d, d, device="meta"))


@pytest.mark.parametrize(
    ("d", "by_channel", "reason"), [(256, True, None), (257, True, 256), (256, False, 128)]
)
def test_longest_heads(d: int, by_channel: bool, reason: int | None) -> None:
    found = LINEAR_ATTENTION.supports(H100, bound_of(1, 64, d, by_channel)[0])
    wanted = f"query has heads of {d}, and one program holds at most {reason}"
    assert found == (wanted if reason else None)


def test_gates_that_channels_share_are_refused() -> None:
    """As `[b, h, t, 1]`, which is a gate a token."""
    operands, _ = bound_of(1, 64, 16, by_channel=True)
    shared = {**operands, "decay": operands["decay"][..., :1]}
    assert LINEAR_ATTENTION.supports(H100, operands) is None
    reason = "decay is [1, 32, 64, 1], and the kernel wants that of the query, [1, 32, 64, 16]"
    assert LINEAR_ATTENTION.supports(H100, shared) == reason


def test_predictions() -> None:
    """A step is bound by the state's bytes; gates are bytes, and log2(chunk) times the products of pairs."""
    operands, result = bound_of(64, 1, 128, by_channel=True)
    lowerings = [LINEAR_ATTENTION, *CHUNKED, reference_lowering(ops.linear_attention)]
    assert choose(lowerings, H100, operands, result, training=False).lowering.name == "triton"
    state_s = 2 * 64 * 32 * 128 * 128 * 4 / H100.bytes_per_s
    assert (
        1.0
        < LINEAR_ATTENTION.cost(H100, operands, result) / (linear_attention_backward.UNMEASURED * state_s)
        < 1.1
    )
    with_gates, without = (
        LINEAR_ATTENTION.cost(H100, *bound_of(1, 4096, 128, by_channel)) for by_channel in (True, False)
    )
    # Gates are read twice, and states of half as many tokens are written and read.
    bytes_more = 2 * 32 * 4096 * 128 * 4 + 2 * 32 * (4096 // 32 - 4096 // 64) * 128 * 128 * 2
    assert with_gates - without == pytest.approx(
        linear_attention_backward.UNMEASURED * bytes_more / H100.bytes_per_s
    )
    flops = linear_attention_channels.pair_flops(32, 128, 256, torch.bfloat16)
    assert flops > 2 * 5 * (2 * 32 * 128)


def test_bytes_of_a_token() -> None:
    """2,560 a head without a decay, as docs/linear-attention.md counts; the last state is written once."""
    seconds = LINEAR_ATTENTION.cost(H100, *bound_of(1, 4096, 128, by_channel=False))
    seconds -= 2 * linear_attention_backward.LAUNCH_S
    moved = seconds / linear_attention_backward.UNMEASURED * H100.bytes_per_s
    assert moved == pytest.approx(32 * (2560 * 4096 + 4 * 128 * 128))
