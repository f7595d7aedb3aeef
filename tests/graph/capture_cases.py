"""Small programs, each with one property that a capture can get wrong, and a comparison with eager."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from effopt.compile import effopt, record
from effopt.plugins.report import Report

Make = Callable[[], tuple[Any, ...]]
MODES = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference": torch.inference_mode}


def make(*sizes: tuple[int, ...], grad: bool = False) -> Callable[[], tuple[Any, ...]]:
    """Equal random inputs each time."""

    def inputs() -> tuple[Any, ...]:
        torch.manual_seed(1)
        return tuple(torch.randn(size).requires_grad_(grad) for size in sizes)

    return inputs


def storage(value: torch.Tensor) -> int | None:
    """Identity of the memory that a tensor reads."""
    return value.untyped_storage()._cdata if value.layout == torch.strided else None


def aliases(outputs: Sequence[Any], inputs: Sequence[Any]) -> list[tuple[int, ...]]:
    """For each output, the inputs and earlier outputs (numbered after the inputs) that share its memory."""
    everything = [*inputs, *outputs]
    found = []
    for i, out in enumerate(outputs):
        before = everything[: len(inputs) + i]
        found.append(
            tuple(
                j
                for j, other in enumerate(before)
                if isinstance(out, torch.Tensor)
                and isinstance(other, torch.Tensor)
                and storage(out) == storage(other)
            )
        )
    return found


def flat(values: Any) -> list[Any]:
    """Leaves of a nest of outputs."""
    return tree_flatten(values)[0]


def assert_same_value(got: Any, expected: Any, rtol: float) -> None:
    """Equal type, dtype, shape, strides, gradient flag and value."""
    assert type(got) is type(expected)
    if not isinstance(expected, torch.Tensor):
        assert got == expected
        return
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert got.requires_grad == expected.requires_grad
    assert got.layout == expected.layout
    if expected.layout == torch.strided and expected.numel():
        sized = [d for d in range(expected.dim()) if expected.shape[d] > 1]
        assert [got.stride(d) for d in sized] == [expected.stride(d) for d in sized]
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol, equal_nan=True)


def gradients(outputs: Sequence[Any], leaves: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """Gradients of a weighted sum of the differentiable outputs."""
    total: Any = 0
    for i, out in enumerate(outputs):
        if isinstance(out, torch.Tensor) and out.requires_grad:
            total = total + (out.float() * torch.linspace(0.5, 1.5, out.numel()).reshape(out.shape)).sum() * (
                i + 1
            )
    if not isinstance(total, torch.Tensor):
        return []
    return list(torch.autograd.grad(total, leaves, allow_unused=True))


def leaves_of(function: Any, inputs: Any) -> list[torch.Tensor]:
    """What gradients are compared for: parameters and inputs that ask for one."""
    parameters = list(function.parameters()) if isinstance(function, nn.Module) else []
    leaves = [*parameters, *(i for i in flat(inputs) if isinstance(i, torch.Tensor))]
    return [leaf for leaf in leaves if leaf.requires_grad and leaf.is_leaf]


def run(
    function: Any, call: Callable[..., Any], inputs: tuple[Any, ...], around: Any, calls: int, backward: bool
) -> list[Any]:
    """Call; give outputs, gradients, inputs afterwards, buffers afterwards, aliases."""
    torch.manual_seed(0)
    for _ in range(calls):
        with around():
            outputs = flat(call(*inputs))
    shared = aliases(outputs, flat(inputs))
    found = gradients(outputs, leaves_of(function, inputs)) if backward else []
    buffers = dict(function.named_buffers()) if isinstance(function, nn.Module) else {}
    return [outputs, found, flat(inputs), buffers, shared]


def assert_as_in_eager(
    function: Any,
    make: Make,
    *,
    around: Callable[[], Any] = torch.enable_grad,
    refused: str | None = None,
    lowering: str = "eager",
    calls: int = 1,
    rtol: float = 1e-6,
    dynamic: bool | None = None,
    graphs: int | None = None,
    gradients_too: bool = True,
    options: Mapping[str, Any] | None = None,
) -> Report:
    """Run `function` as it is and compiled on equal inputs; everything observable must be equal.

    Args:
        function: a module or a function. A module is copied, so that buffers do not meet.
        make: gives fresh, equal inputs each time.
        around: the mode to call in, such as `torch.no_grad`.
        refused: part of the reason that one graph must give; None if none may be refused.
        lowering: `eager` or `auto`.
        calls: how often to call.
        rtol: relative and absolute tolerance.
        dynamic: as for `torch.compile`.
        graphs: number of graphs, if it matters.
        gradients_too: whether to compare gradients.
        options: further options; without them no pass runs.
    """
    torch._dynamo.reset()
    other = copy.deepcopy(function) if isinstance(function, nn.Module) else function
    expected = run(function, function, make(), around, calls, gradients_too)
    settings = {"lowering": lowering, "pipeline": "", **(options or {})}
    with record() as report:
        compiled = torch.compile(other, backend=effopt, dynamic=dynamic, options=settings)
        got = run(other, compiled, make(), around, calls, gradients_too)
    reasons = [g.refused for g in report.graphs if g.refused]
    if refused is None:
        assert not reasons, reasons
    else:
        assert any(refused in reason for reason in reasons), reasons
    if graphs is not None:
        assert len(report.graphs) == graphs
    assert got[4] == expected[4], f"aliases {got[4]}, eager {expected[4]}"
    for part in range(3):
        assert len(got[part]) == len(expected[part])
        for one, two in zip(got[part], expected[part], strict=True):
            assert_same_value(one, two, rtol)
    tree_map(lambda a, b: assert_same_value(a, b, rtol), got[3], expected[3])
    return report
