"""Every Triton lowering against its op's reference in float64: values, strides, gradients, contracts."""

from __future__ import annotations

import pytest
import torch

from effopt.backends.base import Lowering
from effopt.backends.triton import ROW_KERNELS, layer_norm, rms_norm
from effopt.backends.triton.rows import DTYPES
from effopt.graph.ops import Sample
from effopt.graph.tolerances import GRADIENT_FACTOR
from tests.backends.triton.calls import assert_gradients, assert_values, gradients, outputs, wanting_gradients

BY_NAME = {lowering.op.name: lowering for lowering in ROW_KERNELS}
every_lowering = pytest.mark.parametrize("lowering", ROW_KERNELS, ids=BY_NAME)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def call_on(name: str, x: torch.Tensor, vector: torch.Tensor) -> Sample:
    """A call of a row op on `x`, and where it takes a second tensor, on another laid out like it."""
    other = torch.empty_like(x).normal_().detach()
    bias = vector.detach().sin()
    return {
        "rms_norm": Sample((x, vector, 1e-6), {"weight_offset": 1.0}),
        "add_rms_norm": Sample((x, other, vector, 1e-6), {"round_first": True}),
        "layer_norm": Sample((x, [x.shape[-1]], vector, bias, 1e-5), {}),
        "add_layer_norm": Sample((x, other, vector, bias, 1e-5), {}),
        "glu": Sample((x, other, "gelu_tanh"), {}),
        "rope": Sample((x, vector.detach().expand(x.shape[-2:]), bias), {"interleaved": x.dim() == 2}),
    }[name]


@every_dtype
@every_lowering
def test_values(lowering: Lowering, dtype: torch.dtype, device: torch.device) -> None:
    for sample in lowering.op.samples(dtype, device):
        assert_values(lowering, sample)


@every_lowering
def test_gradients(lowering: Lowering, device: torch.device) -> None:
    for dtype in DTYPES:
        # The sum with the residual is rounded before it is normalised, and what that moves in each row
        # need not cancel where the weight's gradient, a sum over rows, does.
        rounded = lowering.op.name.startswith("add") and dtype.itemsize == 2
        for sample in lowering.op.samples(dtype, device):
            assert_gradients(lowering, wanting_gradients(sample), factor=4.0 if rounded else 1.0)


@pytest.mark.parametrize("shape", [(2, 2000), (1, 1, 1, 2), (65, 10), (3, 7, 1026)], ids=str)
@every_lowering
def test_odd_sizes(lowering: Lowering, shape: tuple[int, ...], device: torch.device) -> None:
    sample = call_on(
        lowering.op.name, torch.randn(shape, device=device), torch.randn(shape[-1], device=device)
    )
    assert_values(lowering, sample)
    assert_gradients(lowering, wanting_gradients(sample))


LAYOUTS = {
    "transposed": lambda device: torch.randn(3, 5, 4, 6, device=device).transpose(1, 2),
    "columns-first": lambda device: torch.randn(6, 5, device=device).t(),
    "half of a projection": lambda device: torch.randn(2, 5, 12, device=device)[..., 6:],
    "every other column": lambda device: torch.randn(4, 12, device=device)[:, ::2],
    "expanded rows": lambda device: torch.randn(3, 1, 6, device=device).expand(3, 4, 6),
    "expanded all": lambda device: torch.randn(1, 1, device=device).expand(5, 6),
    "expanded columns": lambda device: torch.arange(5.0, device=device)[:, None].expand(5, 6),
    "middle rows": lambda device: torch.randn(9, 4, 6, device=device)[1:8:3],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@every_lowering
def test_layouts(lowering: Lowering, layout: str, device: torch.device) -> None:
    x = LAYOUTS[layout](device)
    vector = torch.randn(12, device=device)[::2]
    sample = call_on(lowering.op.name, x, vector)
    assert_values(lowering, sample)
    assert_gradients(lowering, wanting_gradients(Sample(tuple(sample.args), sample.kwargs)))


@every_lowering
def test_expanded_upstream_gradient(lowering: Lowering, device: torch.device) -> None:
    """`sum().backward()` hands down one element expanded to the whole shape."""
    x = torch.randn(4, 10, device=device, requires_grad=True)
    sample = call_on(lowering.op.name, x, torch.randn(10, device=device))
    found = []
    for call in (lowering.call, lowering.op.reference):
        total = sum(v.sum() for v in outputs(call(*sample.args, **sample.kwargs)))
        found += torch.autograd.grad(total, x)
    torch.testing.assert_close(*found, rtol=2e-5, atol=1e-5)


@every_lowering
def test_no_rows(lowering: Lowering, device: torch.device) -> None:
    x = torch.randn(0, 6, device=device)
    sample = wanting_gradients(call_on(lowering.op.name, x, torch.randn(6, device=device)))
    assert_values(lowering, sample)
    if lowering.op.name != "rope":
        assert_gradients(lowering, sample)


@every_lowering
def test_opcheck(lowering: Lowering, device: torch.device) -> None:
    """Schema, fake kernel (strides included), autograd registration, and AOTAutograd with dynamic shapes."""
    x = torch.randn(3, 4, 6, device=device).transpose(0, 1).detach().requires_grad_()
    vector = torch.randn(6, device=device)
    name = lowering.op.name
    sample = call_on(name, x, vector.requires_grad_(name != "rope"))
    arguments = lowering.op.bind(sample.args, sample.kwargs)
    dropped = ("normalized_shape", "cudnn_enable")
    op = getattr(torch.ops.effopt_triton, name).default
    torch.library.opcheck(op, tuple(v for k, v in arguments.items() if k not in dropped))


@pytest.mark.parametrize("family", [rms_norm, layer_norm], ids=["rms_norm", "layer_norm"])
def test_programs_walk_over_many_tiles(
    family: object, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three programs for eleven tiles, the last partly empty: dweight is right, and its bits repeat."""
    monkeypatch.setattr(family, "partial_programs", lambda tile, n_rows: 3)
    for name in (n for n in BY_NAME if n.endswith(family.__name__.rpartition(".")[2])):
        x = torch.randn(10 * 8 + 3, 100, device=device)
        sample = wanting_gradients(call_on(name, x, torch.randn(100, device=device)))
        assert_gradients(BY_NAME[name], sample)
        upstream = [torch.ones_like(x), torch.ones_like(x)][: 2 if name.startswith("add") else 1]
        runs = [gradients(BY_NAME[name].call, sample.args, sample.kwargs, upstream) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("unused", [(0,), (1,)], ids=["total only", "normalised only"])
@pytest.mark.parametrize("name", ["add_rms_norm", "add_layer_norm"])
def test_one_output_used(name: str, unused: tuple[int, ...], device: torch.device) -> None:
    sample = call_on(name, torch.randn(5, 63, device=device), torch.randn(63, device=device))
    assert_gradients(BY_NAME[name], wanting_gradients(sample), unused)


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"])
def test_frozen_weight(name: str, device: torch.device) -> None:
    x = torch.randn(5, 63, device=device, requires_grad=True)
    assert_gradients(BY_NAME[name], call_on(name, x, torch.randn(63, device=device)))


def test_bias_without_weight(device: torch.device) -> None:
    x, bias = torch.randn(5, 63, device=device), torch.randn(63, device=device)
    assert_gradients(BY_NAME["layer_norm"], wanting_gradients(Sample((x, [63], None, bias, 1e-5), {})))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_of_another_dtype(weight_dtype: torch.dtype, device: torch.device) -> None:
    """Under autocast the activations are narrower than the weight."""
    x = torch.randn(5, 100, device=device).half()
    weight = torch.randn(100, device=device).to(weight_dtype)
    for kwargs in ({}, {"weight_offset": 1.0}):
        assert_values(BY_NAME["rms_norm"], Sample((x, weight, 1e-6), kwargs))
        assert_gradients(BY_NAME["rms_norm"], wanting_gradients(Sample((x, weight, 1e-6), kwargs)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, under the interpreter, warns of inf - inf
@every_lowering
def test_nan_and_infinity_stay_in_their_row(lowering: Lowering, device: torch.device) -> None:
    x = torch.randn(6, 10, device=device)
    x[1, 3], x[2, 4], x[3, 5], x[4] = float("nan"), float("inf"), float("-inf"), 0.0
    name, vector = lowering.op.name, torch.randn(10, device=device)
    kinds = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid") if name == "glu" else (None,)
    for kind in kinds:
        sample = call_on(name, x, vector)
        assert_values(lowering, Sample((x, x.flip(1), kind), {}) if kind else sample)


def test_cos_shared_by_batch_and_heads(device: torch.device) -> None:
    """Tables `[t, r]`, `[1, 1, t, r]` and expanded ones, and their gradients."""
    x = torch.randn(2, 7, 3, 16, device=device).transpose(1, 2)
    table = torch.randn(7, 8, device=device)
    for cos in (table, table[None, None], table[None, None].expand(2, 1, 7, 8)):
        for interleaved in (False, True):
            sample = Sample((x.detach(), cos.detach(), cos.detach().sin()), {"interleaved": interleaved})
            assert_values(BY_NAME["rope"], sample)
            assert_gradients(BY_NAME["rope"], wanting_gradients(sample))


def test_no_rotation(device: torch.device) -> None:
    x = torch.randn(3, 5, device=device)
    none = torch.empty(3, 0, device=device)
    assert_values(BY_NAME["rope"], Sample((x, none, none), {}))


@pytest.mark.gpu
@every_dtype
@every_lowering
def test_large_on_gpu(lowering: Lowering, dtype: torch.dtype) -> None:
    """Sizes of real models, compiled: values and gradients against float64 on the same device."""
    device, d = torch.device("cuda"), 2048
    for rows in (1, 4097):
        x = torch.randn(rows, d, device=device, dtype=dtype)
        sample = call_on(lowering.op.name, x, torch.randn(d, device=device, dtype=dtype))
        assert_values(lowering, sample)
        if lowering.op.name != "rope":  # its call's tables are views of one vector, whose gradient is not its
            # A weight's gradient is the sum of up to 4097 terms, and some cancel to nearly nothing.
            assert_gradients(lowering, wanting_gradients(sample), factor=GRADIENT_FACTOR)
