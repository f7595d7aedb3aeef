"""Linear attention in chunks: equal to token by token, whatever the chunks, the decay and the sizes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effopt.backends import token_chunks
from effopt.backends.base import choose
from effopt.backends.chunked_linear_attention import LOWERINGS, chunked_linear_attention
from effopt.backends.reference import reference_lowering
from effopt.graph import ops
from effopt.target import target_of

(CHUNKED,) = LOWERINGS
CPU = target_of(torch.device("cpu"))
KINDS = ("none", "head", "token", "channel")


def call_of(
    kind: str, t: int, d: int = 5, dv: int = 3, strength: float = 1.0, seed: int = 0
) -> tuple[list[Tensor], dict[str, Any]]:
    """Operands and options in float64, with a first state."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *sizes: torch.randn(*sizes, generator=generator, dtype=torch.float64)  # noqa: E731
    q, k, v = draw(2, 3, t, d), draw(2, 3, t, d), draw(2, 3, t, dv)
    sizes = {"head": (3,), "token": (2, 3, t), "channel": (2, 3, t, d)}
    decay = None if kind == "none" else -strength * draw(*sizes[kind]).abs()
    return [q, k, v], {"scale": 0.4, "decay": decay, "state": draw(2, 3, d, dv)}


def token_by_token(q: Tensor, k: Tensor, v: Tensor, scale: float, decay: Any, state: Tensor) -> Any:
    """The definition: a loop over time."""
    found = []
    for i in range(q.shape[2]):
        if decay is not None:
            step = decay if decay.dim() == 1 else decay[:, :, i]
            step = step.reshape(*(step.shape if decay.dim() > 1 else (1, -1)), *(1,) * (decay.dim() < 4), 1)
            state = step.exp() * state
        state = state + k[:, :, i, :, None] * v[:, :, i, None, :]
        found.append(scale * (q[:, :, i, None] @ state))
    return torch.cat([v[:, :, :0], *found], 2), state


def assert_equal(got: Any, wanted: Any, tolerance: float = 1e-9) -> None:
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("t", [0, 1, 2, 63, 64, 65, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_token_by_token(kind: str, t: int) -> None:
    operands, options = call_of(kind, t)
    wanted = token_by_token(*operands, **options)
    assert_equal(chunked_linear_attention(*operands, **options), wanted)
    assert_equal(ops.linear_attention.reference(*operands, **options), wanted)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_strong_decay_keeps_the_digits_of_a_weak_one(kind: str) -> None:
    """Resets of exp(-3000) beside steps of exp(-1e-3), in float32: differences of sums lack such digits."""
    operands, options = call_of(kind, 100, strength=1e-3)
    decay = options["decay"]
    decay[1 if kind == "head" else (..., slice(None, None, 7)) if kind == "token" else (1, 1)] = -3000.0
    narrow = [x.float() for x in operands]
    given = {**options, "decay": decay.float(), "state": options["state"].float()}
    exact = token_by_token(*(x.double() for x in narrow), **{**given, "decay": decay.float().double()})
    for call in (chunked_linear_attention, ops.linear_attention.reference):
        assert_equal([x.double() for x in call(*narrow, **given)], exact, 2e-5)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_decay_that_forgets_all(kind: str) -> None:
    operands, options = call_of(kind, 70)
    options["decay"].view(-1)[::2] = -math.inf
    wanted = token_by_token(*operands, **options)
    assert bool(wanted[0].isfinite().all())
    for call in (chunked_linear_attention, ops.linear_attention.reference):
        assert_equal(call(*operands, **options), wanted)
        leaves = [x.clone().requires_grad_() for x in operands]
        grads = torch.autograd.grad(call(*leaves, **options)[0].sum(), leaves)
        assert all(bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("kind", KINDS)
def test_not_a_number_spoils_its_token_and_later_ones(kind: str) -> None:
    operands, options = call_of(kind, 70)
    operands[2][0, 0, 40, 1] = math.nan
    for call in (chunked_linear_attention, ops.linear_attention.reference):
        out, last = call(*operands, **options)
        assert bool(out[0, 0, 40:, 1].isnan().all())
        assert bool(last[0, 0, :, 1].isnan().all())
        assert not bool(out[0, 1:].isnan().any())
        assert not bool(out[0, 0, :, 0].isnan().any())


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_spoils_what_it_does_token_by_token(kind: str, number: float) -> None:
    """No token before it, in the same chunk either, whichever operand holds it."""
    for operand in range(3):
        operands, options = call_of(kind, 70)
        operands[operand][0, 1, 40, 1] = operands[operand][1, 2, 69, 0] = number
        wanted = token_by_token(*operands, **options)
        assert bool(wanted[0][0, 1, :40].isfinite().all())
        assert not bool(wanted[0][0, 1, 40].isfinite().all())
        for call in (chunked_linear_attention, ops.linear_attention.reference):
            for got, exact in zip(call(*operands, **options), wanted, strict=True):
                assert torch.equal(got.isfinite(), exact.isfinite())
                assert_equal([got[got.isfinite()]], [exact[got.isfinite()]])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_what_is_not_finite_are_no_numbers(kind: str) -> None:
    """A loss that is NaN does not give a query, or the value itself, a gradient as if it were none."""
    for call in (chunked_linear_attention, ops.linear_attention.reference):
        operands, options = call_of(kind, 9)
        operands[2][0, 0, 5, 1] = math.inf
        leaves = [x.requires_grad_() for x in operands]
        query, _, value = torch.autograd.grad(call(*leaves, **options)[0].square().sum(), leaves)
        assert bool(query[0, 0, 5:].isnan().all())
        assert bool(value[0, 0, 5, 1].isnan())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_chunks, "CHUNK", 4)
    monkeypatch.setattr(token_chunks, "CHANNEL_CHUNK", 3)
    operands, options = call_of(kind, 7, d=3, dv=2)
    names = [n for n in ("decay", "state") if options[n] is not None]

    def call(*leaves: Tensor) -> Any:
        return chunked_linear_attention(
            *leaves[:3], **{**options, **dict(zip(names, leaves[3:], strict=True))}
        )

    leaves = [x.requires_grad_() for x in (*operands, *(options[n] for n in names))]
    assert torch.autograd.gradcheck(call, leaves)


@settings(max_examples=30)
@given(st.sampled_from(KINDS), st.integers(0, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_chunks_do_not_matter(kind: str, t: int, one: int, other: int, seed: int) -> None:
    operands, options = call_of(kind, t, strength=3.0, seed=seed)
    found = []
    for size in (one, other):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(token_chunks, "CHUNK", size)
            patch.setattr(token_chunks, "CHANNEL_CHUNK", size)
            found.append(chunked_linear_attention(*operands, **options))
    assert_equal(*found)


@settings(max_examples=30)
@given(st.sampled_from(KINDS), st.integers(1, 80), st.floats(0, 1), st.integers(0, 99))
def test_two_calls_are_one(kind: str, t: int, share: float, seed: int) -> None:
    """The state of a first call, handed to a second, carries all that came before."""
    operands, options = call_of(kind, t, seed=seed)
    cut, decay = int(share * t), options["decay"]
    halves = (slice(0, cut), slice(cut, t))
    parts, state = [], options["state"]
    for half in halves:
        own = decay[:, :, half] if kind in ("token", "channel") else decay
        part = [x[:, :, half] for x in operands]
        out, state = chunked_linear_attention(*part, **{**options, "decay": own, "state": state})
        parts.append(out)
    assert_equal((torch.cat(parts, 2), state), chunked_linear_attention(*operands, **options))


@pytest.mark.parametrize(
    ("t", "kind", "name"),
    [
        (1, "head", "reference"),
        (4096, "head", "chunked"),
        (4096, "channel", "chunked"),
        (16, "none", "reference"),
    ],
)
def test_choice_by_cost(t: int, kind: str, name: str) -> None:
    q = torch.empty(1, 8, t, 64, device="meta")
    decay = {"head": q.new_empty(8), "channel": q, "none": None}[kind]
    bound = ops.linear_attention.bind((q, q, q), {"scale": 1.0, "decay": decay})
    lowerings = [CHUNKED, reference_lowering(ops.linear_attention)]
    result = (q, q.new_empty(1, 8, 64, 64))
    assert choose(lowerings, CPU, bound, result, training=False).lowering.name == name


@pytest.mark.parametrize("kind", KINDS)
def test_custom_op_is_well_formed(kind: str) -> None:
    operands, options = call_of(kind, 9)
    given = [x if x is None else x.requires_grad_() for x in (*operands, options["decay"], options["state"])]
    torch.library.opcheck(torch.ops.effopt_chunked.linear_attention.default, (*given, 0.4))


def test_compiled_with_symbolic_sizes() -> None:
    call = torch.compile(
        lambda q, k, v, g: chunked_linear_attention(q, k, v, scale=0.4, decay=g), dynamic=True
    )
    for t in (9, 70):
        operands, options = call_of("token", t)
        wanted = ops.linear_attention.reference(*operands, scale=0.4, decay=options["decay"])
        assert_equal(call(*operands, options["decay"]), wanted)
