"""Every spelling of attention that Inductor itself looks for is recognised here too.

The functions and the shapes of their inputs come from the installed torch, so that a spelling which a
new torch adds is tested without a change here.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._inductor.fx_passes import fuse_attention
from torch.overrides import TorchFunctionMode

NAMES = sorted(
    (n for n in vars(fuse_attention) if n.startswith("_sfdp_pattern_") and n.rpartition("_")[2].isdigit()),
    key=lambda n: int(n.rpartition("_")[2]),
)
SCALARS = {"inv_scale": 2.0, "inv_scale_factor": 2.0, "scale_factor": 0.5}
REFUSED: dict[str, str] = {}
"""Spellings that are left alone, with a part of the reason."""


@functools.cache
def declared() -> dict[str, list[torch.Tensor]]:
    """The example tensors that torch traces each function with, the first of several."""
    found: dict[str, list[torch.Tensor]] = {}
    for _, spec in fuse_attention._get_sfdp_patterns(torch.device("cpu")):
        found.setdefault(spec["search_fn"].__name__, spec["example_inputs"])
    return found


def inputs_of(function: Callable[..., Any], dropout_p: float) -> list[Any]:
    """Drawn inputs of the declared shapes; a mask leaves a key to every row."""
    drawn = torch.Generator().manual_seed(0)
    tensors = iter(declared()[function.__name__])
    given: list[Any] = []
    for name in inspect.signature(function).parameters:
        if name == "dropout_p":
            given.append(dropout_p)
            continue
        example = next(tensors, None)
        if example is None or example.dim() == 0:
            given.append(SCALARS[name])
            continue
        shape = [min(n, 16) for n in example.shape]
        value = torch.randn(shape, generator=drawn)
        if name == "causal_mask" or (name == "attn_mask" and len(shape) == 2):
            value = (value > -0.5).float()
            value[..., 0] = 1.0
        given.append(value.to(example.dtype))
    return given


def compiled_spelling(name: str, inputs: list[Any], compiled: Any) -> tuple[torch.Tensor, Any]:
    """The attention of spelling `name` (some also return key and value), and the report."""
    # Dynamo leaves torch._inductor alone unless it is told otherwise.
    out, report = compiled(torch._dynamo.dont_skip_tracing(getattr(fuse_attention, name)), *inputs)
    return first(out), report


def first(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out


class Unrounded(TorchFunctionMode):
    """Casts to other dtypes give back what they got: a spelling in the dtype of its inputs throughout."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is torch.Tensor.to else func(*args, **(kwargs or {}))


def test_torch_has_the_spellings() -> None:
    assert len(NAMES) >= 24
    assert set(NAMES) == set(declared())


@pytest.mark.parametrize("name", NAMES)
def test_spelling(name: str, compiled: Any) -> None:
    function = getattr(fuse_attention, name)
    inputs = inputs_of(function, dropout_p=0.0)
    out, report = compiled_spelling(name, inputs, compiled)
    if name in REFUSED:
        reasons = [r.reason for r in report.rejected if r.pass_name == "recognize-attention"]
        assert any(REFUSED[name] in reason for reason in reasons), reasons
    else:
        assert report.ops["attention"] == 1, report.rejected
    wanted = first(function(*inputs))
    assert out.dtype == wanted.dtype
    if wanted.dtype == torch.float32:
        torch.testing.assert_close(out, wanted, rtol=2e-5, atol=2e-5)
        return
    # Both round the values to half, eager also its weights: no further from exact, but for one rounding.
    with Unrounded():
        exact = first(function(*(x.double() if isinstance(x, torch.Tensor) else x for x in inputs)))
    rounding = torch.finfo(wanted.dtype).eps / 2 * exact.abs().max()
    assert (out - exact).abs().max() <= (wanted - exact).abs().max() + rounding


WITH_DROPOUT = [n for n in NAMES if "dropout_p" in inspect.signature(getattr(fuse_attention, n)).parameters]


@pytest.mark.parametrize("name", [n for n in WITH_DROPOUT if n not in REFUSED])
def test_spelling_with_dropout_in_training(name: str, compiled: Any) -> None:
    """What is dropped is drawn: the structure is compared, and that weights were dropped."""
    function = getattr(fuse_attention, name)
    inputs = inputs_of(function, dropout_p=0.5)
    for x in inputs[:3]:
        x.requires_grad_()
    out, report = compiled_spelling(name, inputs, compiled)
    assert report.ops["attention"] == 1, report.rejected
    kept = first(function(*inputs_of(function, dropout_p=0.0)))
    assert not torch.allclose(out, kept, atol=1e-2)
    gradients = torch.autograd.grad(out.float().sum(), inputs[:3])
    assert all(g.isfinite().all() and g.any() for g in gradients)
