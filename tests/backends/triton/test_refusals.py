"""What the kernels do not take: the lowering says why, and the call raises if it is made anyway."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from effopt.backends.base import Lowering
from effopt.backends.triton import ROW_KERNELS
from effopt.graph.ops import Sample
from effopt.target import Target, target_of
from tests.backends.triton.calls import H100

BY_NAME = {lowering.op.name: lowering for lowering in ROW_KERNELS}
every_lowering = pytest.mark.parametrize("lowering", ROW_KERNELS, ids=BY_NAME)
X, W = torch.zeros(2, 3, 8), torch.zeros(8)
LONG = torch.zeros(1, 8193)


def reason(name: str, *args: Any, target: Target = H100, **kwargs: Any) -> str | None:
    lowering = BY_NAME[name]
    return lowering.supports(target, lowering.op.bind(args, kwargs))


def first_sample(lowering: Lowering, dtype: torch.dtype) -> Sample:
    return next(iter(lowering.op.samples(dtype, torch.device("cpu"))))


@every_lowering
def test_samples_are_supported_and_cost_what_they_move(lowering: Lowering) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        for sample in lowering.op.samples(dtype, torch.device("cpu")):
            operands = lowering.op.bind(sample.args, sample.kwargs)
            assert lowering.supports(H100, operands) is None
            result = lowering.op.reference(*sample.args, **sample.kwargs)
            assert 0 < lowering.cost(H100, operands, result) < 1e-5


@every_lowering
def test_targets_without_compiled_triton(lowering: Lowering) -> None:
    sample = first_sample(lowering, torch.float32)
    operands = lowering.op.bind(sample.args, sample.kwargs)
    assert "cpu has no compiled Triton" in (lowering.supports(target_of(torch.device("cpu")), operands) or "")
    assert "older than sm_80" in (lowering.supports(Target("cuda", "sm_75", 3e11, 6e13), operands) or "")
    assert lowering.supports(Target("cuda", "gfx942", 5.3e12, 1.3e15), operands) is None


@every_lowering
def test_dtypes_and_empty(lowering: Lowering) -> None:
    sample = first_sample(lowering, torch.float32)
    narrow = [a.to(torch.float8_e4m3fn) if isinstance(a, torch.Tensor) else a for a in sample.args]
    assert "float8_e4m3fn" in (lowering.supports(H100, lowering.op.bind(narrow, sample.kwargs)) or "")
    empty = [a[:0] if isinstance(a, torch.Tensor) and a.dim() > 1 else a for a in sample.args]
    assert "is empty" in (lowering.supports(H100, lowering.op.bind(empty, sample.kwargs)) or "")


REFUSED = {
    "long rows": (("rms_norm", LONG, None, 1e-6), "rows of 8193"),
    "long rows, layer norm": (("layer_norm", LONG, [8193]), "rows of 8193"),
    "long rows of float64": (("rms_norm", torch.zeros(1, 2049).double(), None, 1e-6), "at most 2048"),
    "weight of another length": (("rms_norm", X, torch.zeros(4), 1e-6), "weight has shape [4]"),
    "residual broadcast": (("add_rms_norm", X, X[:1], W, 1e-6), "residual is [1, 3, 8]"),
    "residual of another dtype": (("add_layer_norm", X, X.half(), W, None, 1e-6), "float16"),
    "two dimensions": (("layer_norm", X, [3, 8]), "only the last dimension"),
    "mixed dtypes": (("layer_norm", X.half(), [8], W), "dtype of x"),
    "up broadcast": (("glu", X, X[:1], "silu"), "up is [1, 3, 8]"),
    "unknown activation": (("glu", X, X, "mish"), "'mish'"),
    "five dimensions": (("rope", X[None, None], X, X), "5 dimensions"),
    "odd rotation": (("rope", X, X[..., :3], X[..., :3]), "even number"),
    "rotation longer than the head": (("rope", X[..., :4], X, X), "at most 4"),
    "tables in float32": (("rope", X.half(), X, X), "wants that of x"),
    "tables for other positions": (("rope", X, X[:, :2], X[:, :2]), "not known to broadcast"),
    "long heads": (("rope", torch.zeros(2, 4096), W, W), "longer than 2048"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusal_says_why_and_the_call_raises(case: str) -> None:
    (name, *args), expected = REFUSED[case]
    found = reason(name, *args)
    assert found is not None
    assert expected in found
    if case != "mixed dtypes":
        with pytest.raises((ValueError, TypeError), match=r"expected|rows of|wants|not known"):
            BY_NAME[name].call(*args)


@every_lowering
def test_call_names_a_wrong_dtype(lowering: Lowering) -> None:
    sample = first_sample(lowering, torch.float32)
    whole = [a.to(torch.int32) if isinstance(a, torch.Tensor) else a for a in sample.args]
    with pytest.raises(TypeError, match=r"expected one of .* got torch\.int32"):
        lowering.call(*whole, **sample.kwargs)


def test_symbolic_sizes_add_no_guard() -> None:
    """Any number of rows is taken without a question; a row length that is a symbol is refused."""

    class Norm(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.rms_norm(x, x.shape[-1:]).sum() + torch.rms_norm(y, y.shape[-1:]).sum()

    rows, length = torch.export.Dim("rows"), torch.export.Dim("length")
    exported = torch.export.export(
        Norm(), (torch.zeros(3, 8), torch.zeros(2, 5)), dynamic_shapes=({0: rows}, {1: length})
    )
    x, y = (node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder")
    guards = len(x.fake_mode.shape_env.guards)
    assert reason("rms_norm", x, W, 1e-6) is None
    assert reason("add_layer_norm", x, x, W, None, 1e-6) is None
    assert reason("glu", y, y, "silu") is None
    assert "symbolic" in (reason("rms_norm", y, None, 1e-6) or "")
    assert "symbolic" in (reason("rope", y, y, y) or "")
    assert len(x.fake_mode.shape_env.guards) == guards


def test_cpu_tensor_without_the_interpreter() -> None:
    """Compiled kernels refuse a CPU tensor by name, and importing the kernels needs no GPU."""
    code = (
        "import torch; from effopt.backends.triton import GLU; GLU.call(torch.ones(2), torch.ones(2), 'silu')"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("RuntimeError: glu_kernel: expected a GPU tensor, got one on cpu")
    assert "TRITON_INTERPRET=1" in last
