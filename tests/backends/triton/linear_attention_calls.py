"""Calls of linear attention for tests of its kernels, and the comparison of their gradients."""

from __future__ import annotations

from typing import Any

import torch

from effopt.backends.triton.linear_attention_backward import LINEAR_ATTENTION
from effopt.graph import ops
from effopt.graph.ops import Sample
from tests.backends.triton.calls import assert_near, double, gradients


def call_of(
    dtype: torch.dtype,
    device: torch.device,
    t: int,
    d: int,
    dv: int,
    decay: str = "none",
    state: bool = False,
    b: int = 2,
) -> Sample:
    """Operands of two heads in `dtype`; decay and state, where asked for, in float32."""
    q, k, v = (torch.randn(b, 2, t, n, dtype=dtype, device=device) for n in (d, d, dv))
    sizes = {"head": (2,), "token": (b, 2, t), "channel": (b, 2, t, d)}
    kwargs: dict[str, Any] = {"scale": d**-0.5}
    if decay != "none":
        kwargs["decay"] = -torch.rand(sizes[decay], dtype=torch.float32, device=device)
    if state:
        kwargs["state"] = torch.randn(b, 2, d, dv, device=device)
    return Sample((q, k, v), kwargs)


def assert_gradients(sample: Sample, dtype: torch.dtype) -> None:
    """Of operands, decay and state, of both results; within the table of the largest exact gradient."""
    names = [n for n in ("decay", "state") if n in sample.kwargs]
    leaves = [x.requires_grad_() for x in (*sample.args, *(sample.kwargs[n] for n in names))]
    upstream = [torch.randn_like(x) for x in ops.linear_attention.reference(*sample.args, **sample.kwargs)]

    def call(of: Any) -> Any:
        return lambda *a: of(*a[:3], **{**sample.kwargs, **dict(zip(names, a[3:], strict=True))})

    got = gradients(call(LINEAR_ATTENTION.call), leaves, {}, upstream)
    exact = gradients(
        call(ops.linear_attention.reference), map(double, leaves), {}, [g.double() for g in upstream]
    )
    for g, e, leaf in zip(got, exact, leaves, strict=True):
        assert g.shape == leaf.shape
        size = e.abs().max()
        assert_near((g.double() / size).to(dtype), e / size, dtype)
