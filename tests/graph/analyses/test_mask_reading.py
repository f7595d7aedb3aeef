"""A reading is never wrong: random graphs of masks, read and laid out again, are the masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effopt.graph.analyses.masks.forms import form_of_condition, places
from effopt.graph.analyses.masks.reading import Reader
from effopt.graph.values import shape_of
from tests.graph.analyses.mask_cases import Laid, graph_of

T, S = 5, 7
Numbers = Callable[[Tensor, Tensor], Tensor]
"""Integers that broadcast to `[T, S]`, of two inputs: bytes `[S]` and positions `[T]`."""

DTYPES = st.sampled_from([torch.int64, torch.int64, torch.int32, torch.int8, torch.uint8])
HOLDERS = st.sampled_from([torch.uint8, torch.int8, torch.int64, torch.float16, torch.float32])
"""Dtypes that conditions are held in as numbers."""
SMALL = st.integers(-9, 9)


@st.composite
def indices(draw: st.DrawFn) -> Numbers:
    dtype, start = draw(DTYPES), draw(st.sampled_from([0, 0, 1, 4, 250]))
    start = start if dtype != torch.int8 else min(start, 100)
    over_keys, step = draw(st.booleans()), draw(st.sampled_from([1, 1, 2]))
    n = S if over_keys else T

    def run(_: Tensor, __: Tensor) -> Tensor:
        at = torch.arange(0, step * n, step, dtype=dtype) + start
        return at if over_keys else at.unsqueeze(-1)

    return run


GIVEN: st.SearchStrategy[Numbers] = st.sampled_from([lambda a, b: a, lambda a, b: b[:, None]])


def grown(inner: st.SearchStrategy[Numbers]) -> st.SearchStrategy[Numbers]:
    """One more operation on integers."""
    number = st.tuples(inner, SMALL)
    return st.one_of(
        number.map(lambda x: lambda a, b: x[0](a, b) + x[1]),
        number.map(lambda x: lambda a, b: x[1] - x[0](a, b)),
        number.map(lambda x: lambda a, b: x[0](a, b) * x[1]),
        number.map(lambda x: lambda a, b: x[0](a, b) // (abs(x[1]) + 1)),
        inner.map(lambda x: lambda a, b: x(a, b).abs()),
        inner.map(lambda x: lambda a, b: -x(a, b)),
        st.tuples(inner, DTYPES).map(lambda x: lambda a, b: x[0](a, b).to(x[1])),
        st.tuples(inner, inner).map(lambda x: lambda a, b: x[0](a, b) - x[1](a, b)),
        st.tuples(inner, inner).map(lambda x: lambda a, b: torch.minimum(x[0](a, b), x[1](a, b))),
        inner.map(lambda x: lambda a, b: x(a, b).expand(T, S)[1:].repeat(2, 1)[:T]),
        inner.map(lambda x: lambda a, b: x(a, b).expand(T, S)[:, -3:][:, torch.arange(S) % 3]),
        inner.map(lambda x: lambda a, b: x(a, b).expand(T, S).reshape(1, T, 1, S).squeeze(2)[0]),
        inner.map(lambda x: lambda a, b: x(a, b).expand(T, S).reshape(S, T).mT),
        inner.map(
            lambda x: (
                lambda a, b: (
                    x(a, b).expand(T, S).reshape(-1)[: 4 * S].reshape(2, S, 2)[0, :T].repeat(1, 4)[:, :S]
                )
            )
        ),
        inner.map(lambda x: lambda a, b: x(a, b).expand(T, S).repeat_interleave(2, 0)[3 : 3 + T]),
        inner.map(lambda x: lambda a, b: x(a, b).expand(2, T, S).unbind(0)[1]),
    )


NUMBERS = st.recursive(indices() | GIVEN, grown, max_leaves=4)


def compared(x: Any) -> Numbers:
    one, other, call = x
    return lambda a, b: call(one(a, b), other(a, b) if callable(other) else other)


COMPARED = st.tuples(
    NUMBERS,
    NUMBERS | st.integers(-300, 300),
    st.sampled_from([torch.le, torch.lt, torch.ge, torch.gt, torch.eq, torch.ne]),
).map(compared)


def joined(inner: st.SearchStrategy[Numbers]) -> st.SearchStrategy[Numbers]:
    pair = st.tuples(inner, inner)
    return st.one_of(
        pair.map(lambda x: lambda a, b: x[0](a, b) & x[1](a, b)),
        pair.map(lambda x: lambda a, b: torch.logical_or(x[0](a, b), x[1](a, b))),
        inner.map(lambda x: lambda a, b: ~x(a, b)),
        inner.map(lambda x: lambda a, b: x(a, b).expand(T, S).tril(1)),
        inner.map(lambda x: lambda a, b: x(a, b).to(torch.int64).to(torch.bool)),
        st.tuples(inner, HOLDERS, st.sampled_from([0, 1, -1, 255, 256])).map(
            lambda x: lambda a, b: x[0](a, b).to(x[1]) == x[2]
        ),
        st.tuples(inner, HOLDERS, SMALL).map(
            lambda x: (
                lambda a, b: torch.ones(T, S, dtype=x[1]).tril(x[2]).masked_fill(x[0](a, b), 2).to(torch.bool)
            )
        ),
        st.tuples(inner, inner, inner).map(lambda x: lambda a, b: torch.where(*(y(a, b) for y in x))),
        pair.map(lambda x: lambda a, b: x[0](a, b).expand(T, S).masked_fill(x[1](a, b), False)),
    )


MASKS = st.recursive(COMPARED, joined, max_leaves=4)


@settings(max_examples=100)
@given(MASKS, st.integers(0, 99))
def test_what_is_read_is_what_is_computed(mask: Numbers, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = (
        torch.randint(0, 256, (S,), generator=generator, dtype=torch.uint8),
        torch.randint(-9, 9, (T,), generator=generator),
    )
    module, node = graph_of(lambda b, t, s, *given: mask(*given), 1, T, S, *inputs)
    condition = Reader().at(node, places(shape_of(node)))
    laid = Laid(module, 1, T, S, *inputs)
    wanted = laid.value.expand(T, S)
    torch.testing.assert_close(laid.condition(condition).expand(1, 1, T, S)[0, 0], wanted)
    form = form_of_condition(condition)
    if form.is_read:
        torch.testing.assert_close(laid.all(form.terms).expand(1, 1, T, S)[0, 0], wanted)
