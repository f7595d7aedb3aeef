"""The flash kernel's log-sum-exp against the op's reference in float64."""

from __future__ import annotations

import pytest
import torch

from effopt.backends.triton.attention_lse import ATTENTION_LSE
from effopt.graph import ops
from tests.backends.triton.calls import assert_near, double


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples(dtype: torch.dtype, device: torch.device) -> None:
    for sample in list(ops.attention_lse.samples(dtype, device))[:16]:
        got = ATTENTION_LSE.call(*sample.args, **sample.kwargs)
        kwargs = {n: double(x) if n in ("bias", "sinks") else x for n, x in sample.kwargs.items()}
        exact = ops.attention_lse.reference(*map(double, sample.args), **kwargs)
        assert_near(got[0], exact[0], dtype, 2.0)
        torch.testing.assert_close(got[1].double(), exact[1], rtol=2e-5, atol=2e-5)


def test_parts_joined(device: torch.device) -> None:
    """A row that sees no key of one part is the other's; one that sees none at all is 0."""
    q, k = torch.randn(1, 2, 5, 16, device=device), torch.randn(1, 1, 40, 16, device=device)
    mask = torch.ones(1, 1, 5, 40, dtype=torch.bool, device=device)
    mask[..., 0, :23], mask[..., 1, :] = False, False
    parts = [
        ATTENTION_LSE.call(q, k[:, :, i], k[:, :, i], scale=0.3, mask=mask[..., i])
        for i in (slice(0, 23), slice(23, 40))
    ]
    out, lse = ops.merge_attention.reference(*parts[0], *parts[1])
    wide = (q.double(), k.double(), k.double())
    exact = ops.attention_lse.reference(*wide, scale=0.3, mask=mask)
    assert_near(out, exact[0], torch.float32)
    assert_near(lse, exact[1], torch.float32)
