"""What recognition, cleanup and fusion passes must rewrite, and must leave alone, each pass by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from effopt.passes import canonicalize, cleanup, fusion
from effopt.passes.base import Example, Pass

# Samples of fusions call canonical ops, and torch tells once that it keeps them whole, as it should.
pytestmark = pytest.mark.filterwarnings("ignore:At pre-dispatch tracing:UserWarning")

OURS = {
    "recognize-rms-norm", "recognize-layer-norm", "recognize-activation", "recognize-glu", "recognize-rope",
    "recognize-linear", "remove-no-ops", "eliminate-common-subexpressions", "eliminate-dead-code",
    "fuse-residual-norm", "pack-projections",
}  # fmt: skip
PASSES = [p for f in (canonicalize, cleanup, fusion) for p in f.PASSES if p.name in OURS]


def named(examples: Callable[[Pass], Iterable[Example]]) -> list[Any]:
    """Those of every pass. All but the first of a pass are slow: tests/conformance tries each of them too."""
    return [
        pytest.param(pass_, example, id=f"{pass_.name}-{i}", marks=[pytest.mark.slow] if i else [])
        for pass_ in PASSES
        for i, example in enumerate(examples(pass_()))
    ]


# float32: reassociated sums over 24 elements. bfloat16 and float16: one rounding of the result each way.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def run(compiled: Callable[..., Any], pass_: type[Pass], example: Example, training: bool) -> Any:
    inputs = [x.clone().requires_grad_(training and x.is_floating_point()) for x in example.inputs]
    with torch.set_grad_enabled(training):
        got, report = compiled(example.run, *inputs, pipeline=pass_.name)
        want = example.run(*inputs)
    for a, b in zip(_tensors(got), _tensors(want), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        torch.testing.assert_close(a, b, rtol=TOLERANCE[b.dtype], atol=TOLERANCE[b.dtype], equal_nan=True)
    if training:
        # Not the sum of squares: that of a normalised row is constant, and its gradient only rounding.
        total = [sum((t.float() * _weights(t)).sum() for t in _tensors(out)) for out in (got, want)]
        leaves = [x for x in inputs if x.requires_grad]
        pairs = zip(*(torch.autograd.grad(t, leaves, allow_unused=True) for t in total), strict=True)
        for a, b in pairs:
            assert (a is None) == (b is None)
            if a is not None:
                limit = 1e-4 if b.dtype == torch.float32 else 5e-2
                assert (a - b).abs().max() <= limit * b.abs().max() + 1e-7
    return report


def _weights(like: torch.Tensor) -> torch.Tensor:
    return torch.linspace(-1, 2, like.numel()).cos().view(like.shape)


def _tensors(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("pass_", "example"), named(lambda pass_: pass_.samples()))
def test_sample_is_rewritten(
    pass_: type[Pass], example: Example, training: bool, compiled: Callable[..., Any]
) -> None:
    if example.training not in (None, training):
        pytest.skip("the sample is for the other mode")
    assert run(compiled, pass_, example, training).counts[pass_.name] > 0


@pytest.mark.parametrize(("pass_", "example"), named(lambda pass_: pass_.refusals()))
def test_look_alike_is_left_alone(pass_: type[Pass], example: Example, compiled: Callable[..., Any]) -> None:
    training = bool(example.training)
    with torch.random.fork_rng():  # both sides of a comparison draw from one generator
        report = run(compiled, pass_, example, training)
    assert report.counts[pass_.name] == 0
    assert not example.reason or any(example.reason in r.reason for r in report.rejected)
