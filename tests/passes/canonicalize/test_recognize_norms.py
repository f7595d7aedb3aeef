"""Every ordinary spelling of a norm is one op by one rule, with sizes and eps known or symbolic."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from effopt.compile import effopt, record

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))
import architectures

D, EPS = 24, 1e-5
LENGTHS = (7, 9, 12)

RMS_NORM: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pow, rsqrt": lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w,
    "weight first": lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)),
    "eps first": lambda x, w: x * torch.rsqrt(EPS + x.pow(2).mean(-1, keepdim=True)) * w,
    "times itself": lambda x, w: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPS) * w,
    "square": lambda x, w: x * torch.rsqrt(torch.square(x).mean(-1, keepdim=True) + EPS) * w,
    "power operator": lambda x, w: x * torch.rsqrt((x**2).mean(-1, True) + EPS) * w,
    "over a root": lambda x, w: x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w,
    "over a power": lambda x, w: x / (x.pow(2).mean(-1, keepdim=True) + EPS) ** 0.5 * w,
    "negative power": lambda x, w: x * (x.pow(2).mean(-1, keepdim=True) + EPS).pow(-0.5) * w,
    "one over a root": lambda x, w: x * (1.0 / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPS)) * w,
    "reciprocal": lambda x, w: x * torch.reciprocal(torch.sqrt(x.pow(2).mean(-1, True) + EPS)) * w,
    "sum over size": lambda x, w: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / D + EPS) * w,
    "dimension from the front": lambda x, w: x * torch.rsqrt(x.pow(2).mean(2, keepdim=True) + EPS) * w,
    "weight and root first": lambda x, w: x * (torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w),
    "one plus weight": lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * (1.0 + w),
    "upcast": lambda x, w: (
        w * (h := x.float(), h * torch.rsqrt(h.pow(2).mean(-1, True) + EPS))[1].to(x.dtype)
    ),
    "library call": lambda x, w: torch.rms_norm(x, (D,), w, EPS),
    "module": lambda x, w: torch.nn.functional.rms_norm(x, [D], weight=w, eps=EPS),
}


@pytest.mark.parametrize("name", RMS_NORM)
@pytest.mark.parametrize("symbolic", [False, True], ids=["known sizes", "symbolic length"])
def test_rms_norm_spelling(name: str, symbolic: bool, compiled: Any) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(2, 5, D), torch.rand(D)
    if symbolic:
        torch._dynamo.maybe_mark_dynamic(x, 1)
    out, report = compiled(RMS_NORM[name], x, w, pipeline="recognize-rms-norm")
    assert report.ops["rms_norm"] == 1, report.rejected
    torch.testing.assert_close(out, RMS_NORM[name](x, w), rtol=2e-6, atol=2e-6)


class Norm(nn.Module):
    """A norm with eps as an attribute: a symbol where shapes are dynamic."""

    def __init__(self, center: bool) -> None:
        super().__init__()
        self.center, self.eps = center, 0.3
        self.weight = nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if self.center else x
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


@pytest.mark.parametrize(("center", "op"), [(False, "rms_norm"), (True, "layer_norm")])
def test_eps_attribute_under_dynamic_shapes(center: bool, op: str, compiled: Any) -> None:
    norm, x = Norm(center), torch.randn(2, 5, D)
    out, report = compiled(norm, x, dynamic=True)
    assert report.ops[op] == 1, report.rejected
    torch.testing.assert_close(out, norm(x), rtol=2e-6, atol=2e-6)


def test_another_eps_is_not_taken_for_the_compiled_one() -> None:
    torch._dynamo.reset()
    norm, x = Norm(center=False), torch.randn(2, 5, D)
    fast = torch.compile(norm, backend="effopt", options={"lowering": "eager"}, dynamic=True)
    for eps in (0.3, 0.7, 1e-6):
        norm.eps = eps
        torch.testing.assert_close(fast(x), norm(x), rtol=2e-6, atol=2e-6)


def test_model_with_dynamic_shapes_has_its_norms_and_no_more_graphs() -> None:
    model, inputs = architectures.build("llama", "eager")
    model.eval()
    ids = inputs["input_ids"]
    batches = [ids.repeat(1, 8)[:, :n].contiguous() for n in LENGTHS]
    counter = CompileCounter()
    compiled_calls = []

    def ours(module: Any, example_inputs: Any) -> Any:
        compiled_calls.append(module)
        return effopt(module, example_inputs, options={"lowering": "eager"})

    with torch.no_grad():
        wanted = [model(input_ids=x, use_cache=False)[0] for x in batches]
        torch._dynamo.reset()
        plain = torch.compile(model, backend=counter, dynamic=True)
        for x in batches:
            plain(input_ids=x, use_cache=False)
        torch._dynamo.reset()
        fast = torch.compile(model, backend=ours, dynamic=True)
        with record() as report:
            found = [fast(input_ids=x, use_cache=False)[0] for x in batches]
    assert len(compiled_calls) <= counter.frame_count
    norms = report.ops["rms_norm"] + report.ops["add_rms_norm"]
    assert norms == (2 * model.config.num_hidden_layers + 1) * len(compiled_calls), report.rejected
    for got, want in zip(found, wanted, strict=True):
        assert (got - want).abs().max() <= 2e-5 * want.abs().max()
