"""Sums of gates between two places are read as what they are: summed by loops, they are the tensor."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from effopt.graph.analyses.masks.forms import places
from effopt.graph.analyses.masks.reading import Reader
from effopt.graph.analyses.segment_sums import SUMMED, span_of
from effopt.graph.rewrite import Reject
from effopt.graph.values import shape_of
from tests.graph.analyses.sum_cases import number, traced

GATES = torch.randn(3, 6, dtype=torch.float64)


def below(diagonal: int) -> Tensor:
    return torch.ones(6, 6, dtype=torch.bool).tril(diagonal)


def wide(g: Tensor) -> Tensor:
    return g[..., None].expand(*g.shape, g.shape[-1])


def differences(g: Tensor) -> Tensor:
    total = g.cumsum(-1)
    return total[..., :, None] - total[..., None, :]


SPELLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "difference": differences,
    "turned": lambda g: -0.5 * differences(g),
    "added": lambda g: (-g.cumsum(1)).unsqueeze(1) + g.cumsum(1).unsqueeze(2),
    "halves": lambda g: differences(g / 2) / 4,
    "one sum": lambda g: wide(g.cumsum(-1)),
    "segments": lambda g: wide(g).masked_fill(~below(-1), 0).cumsum(-2),
    "segments by where": lambda g: torch.where(below(-1), wide(g), 0.0).cumsum(-2),
    "segments by tril": lambda g: wide(g).tril(-1).cumsum(1),
    "off by one": lambda g: wide(g).tril().cumsum(-2),
    "off by two": lambda g: wide(g).tril(-2).cumsum(-2),
    "later tokens": lambda g: differences(torch.cat([g, g], -1))[..., 2:8, :6],
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_reading_is_the_tensor(name: str) -> None:
    root, values = traced(SPELLINGS[name], GATES)
    found = span_of(root, places(shape_of(root)), Reader())
    assert found is not None
    span, by = found
    wanted, gates = values[root], values[span.gates]
    for h in range(3):
        for i in range(6):
            for j in range(6):
                index = {"head": h, "query": i, "key": j}
                after, upto = number(span.after, index), number(span.upto, index)
                one = lambda u, index=index: gates[tuple(number(p, index | {SUMMED: u}) for p in span.at)]  # noqa: E731
                total = sum(float(one(u)) for u in range(max(after, -1) + 1, upto + 1))
                if not span.bounded:
                    total -= sum(float(one(u)) for u in range(upto + 1, after + 1))
                assert by * total == pytest.approx(float(wanted[h, i, j]), abs=1e-12)


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "two sums": lambda g: g.cumsum(-1)[..., None] - (2 * g).cumsum(-1)[..., None, :],
    "sums over heads": lambda g: g.cumsum(0)[..., None] - g.cumsum(0)[..., None, :],
    "a sum of sums": lambda g: differences(g) + g.cumsum(-1)[..., None],
    "another factor": lambda g: 2 * g.cumsum(-1)[..., None] - g.cumsum(-1)[..., None, :],
}


@pytest.mark.parametrize("name", REFUSED)
def test_look_alikes(name: str) -> None:
    root, _ = traced(REFUSED[name], GATES)
    with pytest.raises(Reject, match="no difference of one cumulative sum at two tokens"):
        span_of(root, places(shape_of(root)), Reader())


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_the_dtype_is_that_of_fewest_digits(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    def rounded(g: Tensor) -> Tensor:
        total = g.cumsum(-1)
        return total[..., :, None].to(dtypes[0]) - total[..., None, :].to(dtypes[1])

    root, _ = traced(rounded, GATES)
    found = span_of(root, places(shape_of(root)), Reader())
    assert found is not None
    assert found[0].dtype == torch.bfloat16
