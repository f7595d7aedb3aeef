"""What is read of a mask is what the mask is, and nothing that only looks like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effopt.graph.analyses import masks
from effopt.graph.analyses.masks import Band, Form, Groups, Keys, Length, Prefix, RowLimit, Unread
from effopt.graph.analyses.masks.sums import Element, whole
from tests.graph.analyses.mask_cases import KINDS, OF_INPUTS, Laid, Mask, graph_of, positions

INF = float("inf")
SPELLINGS = [(kind, name) for kind, spelled in KINDS.items() for name in spelled]
SPELLINGS_OF_INPUTS = [(kind, name) for kind, spelled in OF_INPUTS.items() for name in spelled]


def read(mask: Mask, b: int, t: int, s: int, *inputs: Tensor) -> Form:
    return masks.form_of(graph_of(mask, b, t, s, *inputs)[1])


@pytest.mark.parametrize(("kind", "name"), SPELLINGS)
def test_form_is_the_mask(kind: str, name: str) -> None:
    @settings(max_examples=8)
    @given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 6))
    def on_sizes(b: int, t: int, more: int) -> None:
        module, node = graph_of(KINDS[kind][name], b, t, t + more)
        form, laid = masks.form_of(node), Laid(module, b, t, t + more)
        assert form.is_read, form
        laid.assert_is(form)

    on_sizes()


@pytest.mark.parametrize(("kind", "name"), SPELLINGS_OF_INPUTS)
def test_form_of_inputs_is_the_mask(kind: str, name: str) -> None:
    mask, inputs = OF_INPUTS[kind][name]
    module, node = graph_of(mask, 2, 7, 7, *inputs)
    form, laid = masks.form_of(node), Laid(module, 2, 7, 7, *inputs)
    assert form.is_read, form
    laid.assert_is(form)


FOUND: dict[str, Callable[[Form], bool]] = {
    "none": lambda f: f.terms == (),
    "causal": lambda f: f.terms == (Band(high=whole(0)),),
    "causal, aligned at the last": lambda f: f.terms == (Band(high=whole(4)),),
    "sliding window": lambda f: f.terms == (Band(whole(-3), whole(0)),),
    "window, both sides": lambda f: f.terms == (Band(whole(-2), whole(2)),),
    "chunks": lambda f: [t.chunk for t in f.terms if isinstance(t, Groups)] == [3],
    "window, anchors": lambda f: (
        [(t.limit, t.otherwise[0].low) for t in f.terms if isinstance(t, Prefix)] == [(whole(2), whole(-3))]
    ),
    "documents, anchor": lambda f: (
        [any(isinstance(o, Groups) for o in t.otherwise) for t in f.terms if isinstance(t, Prefix)] == [True]
    ),
    "prefix": lambda f: [t.limit for t in f.terms if isinstance(t, Prefix)] == [whole(2)],
    "lengths": lambda f: len(f.terms) == 1 and isinstance(f.terms[0], Length),
    "padding": lambda f: any(isinstance(t, Keys) for t in f.terms),
    "documents": lambda f: [t.chunk in (None, 3) for t in f.terms if isinstance(t, Groups)] == [True],
    "offset": lambda f: len(f.terms) == 1 and isinstance(f.band.high.only, Element),  # type: ignore[union-attr]
    "row limit": lambda f: len(f.terms) == 1 and isinstance(f.terms[0], RowLimit),
    "prefix of each entry": lambda f: isinstance(f.terms[0], Prefix),
}


@pytest.mark.parametrize(("kind", "name"), SPELLINGS)
def test_kind(kind: str, name: str) -> None:
    form = read(KINDS[kind][name], 2, 8, 12)
    assert FOUND[kind](form), form


@pytest.mark.parametrize(("kind", "name"), SPELLINGS_OF_INPUTS)
def test_kind_of_inputs(kind: str, name: str) -> None:
    mask, inputs = OF_INPUTS[kind][name]
    form = read(mask, 2, 7, 7, *inputs)
    assert FOUND[kind](form), form


def test_positions_in_documents_are_indices() -> None:
    mask, inputs = OF_INPUTS["documents"]["positions"]
    form = read(mask, 2, 7, 7, *inputs)
    assert form.band == Band(whole(-2), whole(0))
    assert [type(t) for t in form.terms] == [Band, Groups]


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


_docs = torch.tensor([0, 0, 1, 1, 2, 2, 2])
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
        (_docs,),
        lambda f: any(isinstance(t, Groups) for t in f.terms),
    ),
    "documents: less or equal": (
        lambda b, t, s, d: d[:, None] >= d[None, :],
        (_docs,),
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


def biases(name: str) -> Any:
    return {
        "where": lambda t: torch.where(torch.ones(t, t, dtype=torch.bool).tril(), 0.0, -INF),
        "swapped where": lambda t: torch.where(torch.ones(t, t, dtype=torch.bool).triu(1), -1e38, 0.0),
        "triu of -inf": lambda t: torch.full((t, t), -INF).triu(1),
        "one less the mask": lambda t: (1.0 - torch.ones(t, t, dtype=torch.bool).tril().float()) * -1e38,
        "filled": lambda t: torch.zeros(t, t).masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -INF),
        "small": lambda t: torch.where(torch.ones(t, t, dtype=torch.bool).tril(), 0.0, -5.0),
        "one besides": lambda t: torch.full((t, t), -INF).triu(1) + 1.0,
        "opened too": lambda t: torch.where(torch.ones(t, t, dtype=torch.bool).tril(), 1.0, -INF),
    }[name]


@pytest.mark.parametrize("name", ["where", "swapped where", "triu of -inf", "one less the mask", "filled"])
def test_bias_that_hides(name: str) -> None:
    _, node = graph_of(lambda b, t, s: biases(name)(t), 1, 6, 6)
    bias = masks.bias_of(node)
    assert not bias.added
    assert masks.form_of_condition(bias.open).terms == (Band(high=whole(0)),)


@pytest.mark.parametrize("name", ["small", "one besides", "opened too"])
def test_bias_that_adds(name: str) -> None:
    _, node = graph_of(lambda b, t, s: biases(name)(t), 1, 6, 6)
    assert masks.bias_of(node).added
    assert not masks.is_causal(node)


def alibi(b: int, t: int, s: int, slopes: Tensor) -> Tensor:
    hidden = torch.where(positions(t, s)[1] <= positions(t, s)[0], 0.0, torch.finfo(torch.float32).min)
    return slopes[:, None, None] * torch.arange(s) + hidden


def alibi_of_distance(b: int, t: int, s: int, slopes: Tensor) -> Tensor:
    return (positions(t, s)[1] - positions(t, s)[0]).float()[None] * slopes[:, None, None]


def table(b: int, t: int, s: int, weight: Tensor) -> Tensor:
    far = (positions(t, s)[1] - positions(t, s)[0]).clamp(-3, 3) + 3
    return torch.nn.functional.embedding(far, weight).permute(2, 0, 1)


def table_indexed(b: int, t: int, s: int, weight: Tensor) -> Tensor:
    return weight[positions(t, s)[1] - positions(t, s)[0] + t - 1].permute(2, 0, 1)


def buckets(b: int, t: int, s: int, weight: Tensor) -> Tensor:
    """As T5 does."""
    far = positions(t, s)[1] - positions(t, s)[0]
    near, far_log = far.abs() < 3, 3 + (far.abs().float() / 3).log().to(torch.long)
    bucket = (far > 0).to(torch.long) * 3 + torch.where(
        near, far.abs(), torch.min(far_log, torch.full_like(far, 5))
    )
    return torch.nn.functional.embedding(bucket, weight).permute(2, 0, 1)[None]


KINDS_OF_BIAS: dict[str, tuple[Mask, Tensor, list[str]]] = {
    "alibi, and causal": (alibi, torch.rand(4), ["alibi"]),
    "alibi of the distance": (alibi_of_distance, torch.rand(4), ["alibi"]),
    "slope of each query": (
        lambda b, t, s, x: x[:, None] * (positions(t, s)[1] - positions(t, s)[0]),
        torch.rand(6),
        ["tensor"],
    ),
    "square of the distance": (
        lambda b, t, s, x: x[:, None, None] * (positions(t, s)[1] - positions(t, s)[0]) ** 2,
        torch.rand(4),
        ["tensor"],
    ),
    "table": (table, torch.rand(7, 4), ["relative table"]),
    "table of logarithmic buckets": (buckets, torch.rand(9, 4), ["relative table"]),
    "table of the sum": (
        lambda b, t, s, w: w[(positions(t, s)[1] + positions(t, s)[0])].permute(2, 0, 1),
        torch.rand(20, 4),
        ["tensor"],
    ),
    "of the key": (lambda b, t, s, x: x[None, :].expand(t, s), torch.rand(6), ["per key"]),
    "learned": (lambda b, t, s, x: x * 2.0, torch.rand(6, 6), ["tensor"]),
}


@pytest.mark.parametrize("name", KINDS_OF_BIAS)
def test_kind_of_bias(name: str) -> None:
    mask, given_, kinds = KINDS_OF_BIAS[name]
    _, node = graph_of(mask, 1, 6, 6, given_)
    bias = masks.bias_of(node)
    assert [a.kind for a in bias.added] == kinds
    assert len(bias.hidden) == (name == "alibi, and causal")


@pytest.mark.parametrize(
    ("mask", "sees"),
    [
        (KINDS["causal"]["tril"], True),
        (KINDS["sliding window"]["compared"], True),
        (KINDS["chunks"]["causal"], True),
        (lambda b, t, s: positions(t, s)[1] < positions(t, s)[0], False),
        (lambda b, t, s: positions(t, s)[1] > positions(t, s)[0], False),
        (lambda b, t, s, m: m[:, None, None, :] & torch.ones(t, s, dtype=torch.bool).tril(), False),
        (lambda b, t, s, d: d[:, None] == d[None, :], True),
    ],
)
def test_rows_that_see_a_key(mask: Mask, sees: bool) -> None:
    """`m`, `d`: whatever is given, a mask of an input may hide all keys, and a document holds the query."""
    given_ = [torch.ones(2, 7, dtype=torch.bool)] if mask.__code__.co_argcount == 4 else []
    given_ = [_docs] if "d" in mask.__code__.co_varnames else given_
    _, node = graph_of(mask, 2, 7, 7, *given_)
    assert masks.every_row_sees(node) == sees
