"""Code compiled for one module runs others of its class: each has constants of its own parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import effopt
from tests.models.eager_twin import twin_of


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


@pytest.mark.parametrize("lowering", ["eager", "auto"])
def test_two_models_and_two_graphs_in_any_order(lowering: str) -> None:
    options = {"passes": "quantize-weights{bits=8}", "lowering": lowering}
    models = [model(0), model(1)]
    compiled = [torch.compile(m, backend="effopt", options=options) for m in models]
    inputs = [torch.randn(3, 64), torch.randn(2, 5, 64)]
    with torch.no_grad(), effopt.record() as report:
        wanted = [[twin_of(m, bits=8)(x) for x in inputs] for m in models]
        for which, shape in [(0, 0), (0, 1), (1, 0), (0, 1), (1, 1), (0, 0), (1, 0), (1, 1), (0, 1)]:
            torch.testing.assert_close(compiled[which](inputs[shape]), wanted[which][shape])
    assert len(report.graphs) == 2  # the second model runs the code of the first


def test_a_change_of_one_model_is_its_own() -> None:
    options = {"passes": "quantize-weights{bits=8}", "lowering": "eager"}
    first, second = model(0), model(1)
    compiled = [torch.compile(m, backend="effopt", options=options) for m in (first, second)]
    x = torch.randn(3, 64)
    with torch.no_grad():
        before = [c(x).clone() for c in compiled]
        first[0].weight.mul_(2)
        torch.testing.assert_close(compiled[1](x), before[1])
        torch.testing.assert_close(compiled[0](x), twin_of(first, bits=8)(x))
        second[2].weight = nn.Parameter(torch.randn(64, 64))
        torch.testing.assert_close(compiled[1](x), twin_of(second, bits=8)(x))
        torch.testing.assert_close(compiled[0](x), twin_of(first, bits=8)(x))


def test_constants_of_a_model_go_with_it() -> None:
    """A graph that outlives a module it was called for holds nothing of it."""
    import gc
    import weakref

    from effopt.graph.derivation import derivations_of

    options = {"passes": "quantize-weights{bits=8}", "lowering": "eager"}
    kept, dropped = model(0), model(1)
    run = torch.compile(kept, backend="effopt", options=options)
    other = torch.compile(dropped, backend="effopt", options=options)
    x = torch.randn(3, 64)
    with torch.no_grad():
        run(x)
        other(x)
        packed = weakref.ref(derivations_of(dropped[0].weight)[0])
        del other, dropped
        gc.collect()
        kept[0].weight.mul_(2)  # the next call looks at what it holds
        run(x)
    assert packed() is None
    assert copy.deepcopy(kept)(x).shape == (3, 64)
