"""What is read from a bias: what it hides, and what it adds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from effopt.graph.analyses import masks
from effopt.graph.analyses.masks import Band
from effopt.graph.analyses.masks.sums import whole
from tests.graph.analyses.mask_cases import Mask, graph_of, positions
from tests.graph.analyses.mask_forms import INF


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
