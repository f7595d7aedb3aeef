"""Operands of prefill that do not lie evenly are copied; those of few rows are read where they lie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effopt.backends.triton.attention_refusals import checked, evenly, prepare
from effopt.graph import ops
from effopt.graph.ops import Sample
from tests.backends.triton.attention_calls import assert_attention_gradients
from tests.backends.triton.attention_cases import assert_values


def layouts(t: int, device: torch.device) -> dict[str, Tensor]:
    """One head `[1, 1, t, 16]`, laid out in ways that are to be copied."""
    return {
        "turned": torch.randn(1, 1, 16, t, device=device).transpose(2, 3),
        "every other": torch.randn(1, 1, t, 32, device=device)[..., ::2],
        "odd lines": torch.randn(1, 1, t, 17, device=device)[..., :16],
        "odd begin": torch.randn(t * 16 + 1, device=device)[1:].view(1, 1, t, 16),
    }


def test_what_is_copied(device: torch.device) -> None:
    for x in layouts(70, device).values():
        copied = evenly(x)
        assert copied.is_contiguous()
        assert copied.data_ptr() != x.data_ptr()
        assert copied.data_ptr() % 16 == 0
        assert torch.equal(copied, x)
    whole = torch.randn(2, 70, 2, 16, device=device).transpose(1, 2)
    for x in (whole, whole[:, :1].expand(2, 4, 70, 16), torch.randn(1, 1, 1, 17, device=device)[..., :16]):
        assert evenly(x) is x


@pytest.mark.parametrize("layout", layouts(2, torch.device("cpu")))
def test_values_and_gradients(layout: str, device: torch.device) -> None:
    made = tuple(layouts(70, device)[layout] for _ in range(3))
    call = checked(*prepare(ops.attention.bind(made, {"scale": 0.3})))
    assert all(x.is_contiguous() for x in (call.query, call.key, call.value))
    assert_values("whole", Sample(made, {"scale": 0.3, "is_causal": True}))
    assert_attention_gradients(made, {"scale": 0.3, "is_causal": True})


def test_a_decode_step_reads_keys_where_they_lie(device: torch.device) -> None:
    keys = layouts(70, device)["turned"]
    call = checked(*prepare(ops.attention.bind((keys[:, :, :1], keys, keys), {"scale": 0.3})))
    assert call.key.data_ptr() == keys.data_ptr()
