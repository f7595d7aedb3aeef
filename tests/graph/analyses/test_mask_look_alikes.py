"""Masks that only look like a kind, and what stops the reading of others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from effopt.graph.analyses import masks
from effopt.graph.analyses.masks import Band, Form, Groups, Keys, Length, Prefix, Unread
from tests.graph.analyses.mask_cases import Laid, Mask, graph_of, positions
from tests.graph.analyses.mask_forms import DOCS, FOUND, read


def by_byte(b: int, t: int, s: int) -> Tensor:
    """Positions wrap at 256."""
    at = torch.arange(s, dtype=torch.uint8) + 250
    return at <= (torch.arange(t, dtype=torch.uint8) + 250)[:, None]


def rounded(b: int, t: int, s: int) -> Tensor:
    """Positions of half precision: equal where they are not."""
    return torch.arange(s).half() <= torch.arange(t).half()[:, None]


def cast_twice(b: int, t: int, s: int) -> Tensor:
    """One half is 0 as an integer, and that is False."""
    half = torch.full((t, s), 0.5).to(torch.int64).to(torch.bool)
    return half | (positions(t, s)[1] <= positions(t, s)[0] - 2)


_at = torch.arange(7).expand(2, 7)
ALIKE: dict[str, tuple[Mask, tuple[Tensor, ...], Callable[[Form], bool]]] = {
    "causal: strictly before": (lambda b, t, s: positions(t, s)[1] < positions(t, s)[0], (), FOUND["causal"]),
    "causal: one ahead": (lambda b, t, s: positions(t, s)[1] <= positions(t, s)[0] + 1, (), FOUND["causal"]),
    "causal: transposed": (lambda b, t, s: positions(t, s)[1] >= positions(t, s)[0], (), FOUND["causal"]),
    "causal: transposed by a view": (
        lambda b, t, s: torch.ones(t, t, dtype=torch.bool).tril().t(),
        (),
        FOUND["causal"],
    ),
    "causal: counted backwards": (
        lambda b, t, s: torch.arange(s - 1, -1, -1) <= torch.arange(t)[:, None],
        (),
        FOUND["causal"],
    ),
    "causal: every second": (
        lambda b, t, s: torch.arange(0, 2 * s, 2) <= torch.arange(t)[:, None],
        (),
        FOUND["causal"],
    ),
    "causal: or something": (
        lambda b, t, s, m: (positions(t, s)[1] <= positions(t, s)[0]) | m,
        (torch.ones(7, dtype=torch.bool),),
        FOUND["causal"],
    ),
    "causal: sides swapped": (
        lambda b, t, s: torch.where(positions(t, s)[1] <= positions(t, s)[0], False, True),
        (),
        FOUND["causal"],
    ),
    "causal: bytes that wrap": (by_byte, (), FOUND["causal"]),
    "causal: cast to nothing": (cast_twice, (), FOUND["causal"]),
    "none: cast to nothing": (cast_twice, (), FOUND["none"]),
    "causal: 300 as a byte": (
        lambda b, t, s: (
            torch.arange(s)[None, :]
            <= torch.arange(t)[:, None] + torch.full((), 300).to(torch.uint8).to(torch.int64) - 300
        ),
        (),
        FOUND["causal"],
    ),
    "causal: a number that a byte does not hold": (
        lambda b, t, s: torch.ones(t, s, dtype=torch.uint8).tril() != 256,
        (),
        FOUND["causal"],
    ),
    "causal: halves rounded down": (
        lambda b, t, s: (
            torch.div(positions(t, s)[0] - positions(t, s)[1] + 0.0, 2.0, rounding_mode="floor") == 0
        ),
        (),
        FOUND["causal"],
    ),
    "causal: half precision": (rounded, (), FOUND["causal"]),
    "causal: random": (lambda b, t, s: torch.rand(t, s) < 0.5, (), FOUND["causal"]),
    "causal: an index counted from the end": (
        lambda b, t, s: torch.arange(s)[torch.arange(s) - 1] <= torch.arange(t)[:, None],
        (),
        lambda f: bool(f.band.high),
    ),
    "aligned at the last: of the batch": (
        lambda b, t, s, past: positions(t, s)[1] <= positions(t, s)[0] + past[:, None, None, None],
        (torch.tensor([1, 4]),),
        lambda f: f.band.high is not None and f.band.high.number is not None,
    ),
    "window: one wider": (
        lambda b, t, s: torch.ones(t, s, dtype=torch.bool).tril().triu(-4),
        (),
        FOUND["sliding window"],
    ),
    "window: or": (
        lambda b, t, s: (
            (positions(t, s)[1] <= positions(t, s)[0]) | (positions(t, s)[1] > positions(t, s)[0] - 4)
        ),
        (),
        FOUND["sliding window"],
    ),
    "window: outside of it": (
        lambda b, t, s: (positions(t, s)[0] - positions(t, s)[1]).abs() >= 2,
        (),
        FOUND["window, both sides"],
    ),
    "chunks: of another size on one side": (
        lambda b, t, s: positions(t, s)[0] // 3 == positions(t, s)[1] // 4,
        (),
        FOUND["chunks"],
    ),
    "chunks: of the true quotient": (
        lambda b, t, s: positions(t, s)[0] / 3 == positions(t, s)[1] / 3,
        (),
        FOUND["chunks"],
    ),
    "chunks: rounded to zero": (
        lambda b, t, s: (
            torch.div(positions(t, s)[0] - 5, 3, rounding_mode="trunc")
            == torch.div(positions(t, s)[1] - 5, 3, rounding_mode="trunc")
        ),
        (),
        FOUND["chunks"],
    ),
    "prefix: of each row": (
        lambda b, t, s, n: (positions(t, s)[1] < n[:, None]) | (positions(t, s)[1] <= positions(t, s)[0]),
        (torch.arange(7),),
        lambda f: bool(f.terms) and isinstance(f.terms[0], Prefix),
    ),
    "documents: not the same": (
        lambda b, t, s, d: d[:, None] != d[None, :],
        (DOCS,),
        lambda f: any(isinstance(t, Groups) for t in f.terms),
    ),
    "documents: less or equal": (
        lambda b, t, s, d: d[:, None] >= d[None, :],
        (DOCS,),
        lambda f: any(isinstance(t, Groups) for t in f.terms),
    ),
    "lengths: of each row": (
        lambda b, t, s, n: torch.arange(s)[None, :] < n[:, None],
        (torch.arange(7),),
        lambda f: any(isinstance(t, Length) for t in f.terms),
    ),
    "padding: of queries": (
        lambda b, t, s, m: m[:, None, :, None].expand(b, 1, t, s),
        (_at > 2,),
        lambda f: any(isinstance(t, Keys) for t in f.terms),
    ),
    "positions: without their documents": (
        lambda b, t, s, at: at[:, None, None, :] <= at[:, None, :, None],
        (_at.contiguous(),),
        lambda f: f.band != Band(),
    ),
    "positions: documents by others": (
        lambda b, t, s, at, other: (
            (lambda doc: doc[:, None, None, :] == doc[:, None, :, None])(
                (other.diff(prepend=other[:, :1] - 1, dim=-1) != 1).cumsum(-1)
            )
            & (at[:, None, None, :] <= at[:, None, :, None])
        ),
        (_at.contiguous(), _at.contiguous()),
        lambda f: f.band != Band(),
    ),
    "positions: documents where they do not grow by 2": (
        lambda b, t, s, at: (
            (lambda doc: doc[:, None, None, :] == doc[:, None, :, None])(
                (at.diff(prepend=at[:, :1] - 1, dim=-1) != 2).cumsum(-1)
            )
            & (at[:, None, None, :] <= at[:, None, :, None])
        ),
        (_at.contiguous(),),
        lambda f: f.band != Band(),
    ),
}


@pytest.mark.parametrize("name", ALIKE)
def test_what_only_looks_alike(name: str) -> None:
    mask, inputs, is_taken = ALIKE[name]
    module, node = graph_of(mask, 2, 7, 7, *inputs)
    form = masks.form_of(node)
    assert not is_taken(form), form
    if not form.is_read:
        return
    laid = Laid(module, 2, 7, 7, *inputs)
    laid.assert_is(form)


@pytest.mark.parametrize(
    "name",
    [
        "causal: half precision",
        "causal: random",
        "causal: halves rounded down",
        "chunks: of the true quotient",
    ],
)
def test_what_stops_the_reading_is_named(name: str) -> None:
    form = read(ALIKE[name][0], 2, 7, 7)
    assert any(isinstance(t, Unread) for t in form.terms)
    assert form.unread()
