"""What is read of a mask is what the mask is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effopt.graph.analyses import masks
from effopt.graph.analyses.masks import Band, Groups
from effopt.graph.analyses.masks.sums import whole
from tests.graph.analyses.mask_cases import KINDS, OF_INPUTS, Laid, Mask, graph_of, positions
from tests.graph.analyses.mask_forms import DOCS, FOUND, read

SPELLINGS = [(kind, name) for kind, spelled in KINDS.items() for name in spelled]
SPELLINGS_OF_INPUTS = [(kind, name) for kind, spelled in OF_INPUTS.items() for name in spelled]


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
    given_ = [DOCS] if "d" in mask.__code__.co_varnames else given_
    _, node = graph_of(mask, 2, 7, 7, *given_)
    assert masks.every_row_sees(node) == sees
