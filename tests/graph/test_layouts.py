"""Layouts are told by strides, and given to what takes a tensor's place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effopt.graph.layouts import order_in_memory


@pytest.mark.parametrize(
    ("value", "order"),
    [
        (torch.empty(2, 3, 4), [0, 1, 2]),
        (torch.empty(2, 3, 4).permute(2, 0, 1), [1, 2, 0]),
        (torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last), [0, 2, 3, 1]),
        (torch.empty(()), []),
        (torch.empty(3, 8)[:, :4], None),
        (torch.empty(3, 8)[:, ::2], None),
        (torch.empty(3, 1).expand(3, 4), None),
        (torch.empty(9).as_strided((3, 3), (1, 1)), None),
    ],
)
def test_order_in_memory(value: Tensor, order: list[int] | None) -> None:
    assert order_in_memory(value) == order


def test_sizes_of_one_may_have_any_stride() -> None:
    assert order_in_memory(torch.empty(12).as_strided((4, 1, 3), (3, 77, 1))) is not None
