"""The least number that a tensor may hold: of constants and choices, through views and casts."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from effopt.graph.analyses.masks import least_number
from tests.graph.analyses.recurrence_cases import graph_of

INF = math.inf
MASK = torch.rand(3, 5) > 0.5
Form = Callable[[Tensor], Tensor]

# What is computed of a mask, the least number of it, and of its negative.
KNOWN: dict[str, tuple[Form, float, float]] = {
    "a number": (lambda m: torch.full((3, 5), -2.5), -2.5, 2.5),
    "a choice": (lambda m: torch.where(m, 0.0, -1e9), -1e9, 0.0),
    "a fill": (lambda m: torch.zeros(3, 5).masked_fill(~m, -3.0), -3.0, 0.0),
    "choices of choices": (lambda m: torch.where(m, torch.where(m.flip(0), 7.0, 1.0), -4.0), -4.0, -7.0),
    "views": (lambda m: torch.where(m, 1.0, 2.0)[:, 1:].T[None].expand(2, -1, -1).reshape(-1), 1.0, -2.0),
    "a mask as numbers": (lambda m: m[None].to(torch.float64), 0.0, -1.0),
    "a mask as whole numbers, and those as others": (lambda m: m.to(torch.int64).to(torch.half), 0.0, -1.0),
    "a narrower type": (lambda m: torch.where(m, 0.0, -65504.0).half(), -65504.0, 0.0),
}
UNKNOWN: dict[str, Form] = {
    "-inf": lambda m: torch.where(m, 0.0, -INF),
    "-inf in a narrower type": lambda m: torch.where(m, 0.0, -1e9).half(),
    "what is computed": lambda m: torch.where(m, 0.0, -1.0) * 2,
    "NaN": lambda m: torch.full((3, 5), math.nan),
    "whole numbers that wrap": lambda m: torch.where(m, 0.0, 300.0).to(torch.uint8),
}


def result(form: Form) -> Node:
    (output,) = graph_of(form, MASK).find_nodes(op="output")
    (node,) = output.args[0]  # type: ignore[misc, union-attr]
    assert isinstance(node, Node)
    return node


@pytest.mark.parametrize("name", KNOWN)
def test_it_is_the_least(name: str) -> None:
    form, least, of_negative = KNOWN[name]
    node, value = result(form), form(MASK)
    assert (least_number(node), least_number(node, -1.0)) == (least, of_negative)
    assert bool((value >= least).all())
    assert bool((-value.double() >= of_negative).all())


@pytest.mark.parametrize("name", UNKNOWN)
def test_it_is_not_known(name: str) -> None:
    assert least_number(result(UNKNOWN[name])) == -INF


def test_infinity_times_nothing_is_not_known() -> None:
    assert least_number(result(lambda m: torch.where(m, 0.0, INF)), 0.0) == -INF
    assert least_number(result(lambda m: torch.where(m, 0.0, INF)), 2.0) == 0.0
