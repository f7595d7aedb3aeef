"""Loops over time, unrolled: which are linear recurrences, and what is found of them."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from effopt.graph.analyses.lockstep import Along, Apply, Lockstep, Same, State, leaves
from effopt.graph.analyses.recurrences import recurrences
from tests.graph.analyses.recurrence_cases import Loop, found_in, graph_of, plain, read


def other_order(a: Tensor, u: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    h, ys = u.new_zeros(2, 3, 4), []
    for x, y, z in zip(a.unbind(1), u.split(1, 1), c.unbind(1), strict=True):
        h = y[:, 0] + h * x
        ys.append(torch.einsum("bdn,bn->bd", h, z)[:, None])
    return torch.cat(ys, 1), h


def joined_product(a: Tensor, u: Tensor, c: Tensor) -> Tensor:
    h, out = 0, torch.empty(2, a.shape[1], 3)
    for i in range(a.shape[1]):
        h = torch.addcmul(u[:, i], a[:, i], h) if i else 0 * a[:, i] + u[:, i]
        out[:, i] = read(h, c, i)
    return out


def written(a: Tensor, u: Tensor, c: Tensor) -> Tensor:
    h, out = torch.zeros(2, 3, 4), torch.empty(2, a.shape[1], 3)
    for i in range(a.shape[1]):
        h = a[:, i] * h + u[:, i]
        out[:, i] = read(h, c, i)
    return out


def backwards(a: Tensor, u: Tensor, c: Tensor) -> Tensor:
    h, ys = torch.zeros(2, 3, 4), []
    for i in reversed(range(a.shape[1])):
        h = a[:, i] * h + u[:, i]
        ys.append(read(h, c, i))
    return torch.stack(ys[::-1], 1)


@pytest.mark.parametrize("loop", [plain, other_order, written, backwards])
def test_spellings_of_one_recurrence(loop: Loop) -> None:
    found = found_in(loop)
    assert not found.misses
    (one,) = found.recurrences
    assert one.steps == 4
    assert one.start is None
    assert one.reads_last == (loop is other_order)
    assert isinstance(one.decay, Along)
    assert one.decay.axis == 1
    stride = -1 if loop is backwards else 1
    assert (one.decay.first, one.decay.stride) == (3 if loop is backwards else 0, stride)
    (output,) = one.outputs
    assert output.collected.axis == 1
    assert output.reverse == (loop is backwards)
    assert {type(leaf) for leaf in leaves(output.series)} == {State, Along}
    assert [s.name for s in sorted(one.sources)] == ["arg0_1", "arg1_1", "arg2_1"]


def test_a_first_step_of_another_form_is_a_start_and_its_output_is_missed() -> None:
    found = found_in(joined_product)
    assert not found.recurrences
    assert "collects 4 values, and the loop has 3 steps" in found.misses[0].reason


def test_outer_products_and_one_gate_a_head() -> None:
    def linear_attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        state, ys = torch.zeros(2, 3, 4, 5), []
        for i in range(k.shape[2]):
            state = state * g[:, :, i].exp()[..., None, None]
            state = state + k[:, :, i, :, None] * v[:, :, i, None]
            ys.append((state * q[:, :, i, :, None]).sum(-2))
        return torch.stack(ys, 2), state

    q, k, v, g = (torch.randn(2, 3, 6, n) for n in (4, 4, 5, 1))
    (one,) = recurrences(graph_of(linear_attention, q, k, v, g[..., 0])).recurrences
    assert one.reads_last
    assert isinstance(one.added, Apply)
    assert isinstance(one.decay, Apply)
    assert [leaf.axis for leaf in leaves(one.added) if isinstance(leaf, Along)] == [2, 2]


def test_no_decay_and_a_given_state() -> None:
    def sums(u: Tensor, c: Tensor, h: Tensor) -> Tensor:
        ys = []
        for i in range(u.shape[1]):
            h = h + u[:, i]
            ys.append(read(h, c, i))
        return torch.stack(ys, 1)

    inputs = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 4), torch.randn(2, 3, 4)
    (one,) = recurrences(graph_of(sums, *inputs)).recurrences
    assert one.decay is None
    assert one.start is not None
    assert list(one.start.meta["val"].shape) == [2, 3, 4]


@pytest.mark.parametrize("steps", [16, 64])
def test_work_is_linear_in_steps(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from effopt.graph.analyses import lockstep

    calls = 0
    part_at = lockstep.part_at

    def counted(node: Any) -> Any:
        nonlocal calls
        calls += 1
        return part_at(node)

    monkeypatch.setattr(lockstep, "part_at", counted)
    (one,) = found_in(plain, steps).recurrences
    assert one.steps == steps
    assert calls <= 12 * steps


def test_a_number_that_every_step_adds() -> None:
    def loop(a: Tensor, u: Tensor, c: Tensor) -> Tensor:
        h, ys = torch.zeros(2, 3, 4), []
        for i in range(4):
            h = h * a[:, i] + 0.3
            ys.append(read(h, c, i))
        return torch.stack(ys, 1)

    (one,) = found_in(loop).recurrences
    assert one.added == Same(0.3)
    assert {source.name for source in one.sources} == {"arg0_1", "arg1_1"}


@pytest.mark.parametrize("numbers", [(0.1, 0.1, 0.2, 0.1), (1, True, 1, 1), (1, 1.0, 1, 1)])
def test_numbers_that_differ_in_value_or_type(numbers: tuple[Any, ...]) -> None:
    """None of them is taken for four equal steps."""

    def loop(a: Tensor, u: Tensor, c: Tensor) -> Tensor:
        h, ys = torch.zeros(2, 3, 4), []
        for i, number in enumerate(numbers):
            h = h * a[:, i] + number
            ys.append(read(h, c, i))
        return torch.stack(ys, 1)

    assert not found_in(loop).recurrences


def test_numbers_are_compared_by_type_before_they_are_remembered() -> None:
    lockstep = Lockstep()
    kinds = [lockstep.series([number] * 3) for number in (1, 1.0, True)]
    assert [type(kind.node) for kind in kinds if isinstance(kind, Same)] == [int, float, bool]


def test_a_fault_in_one_loop_is_told_there_and_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def two(a: Tensor, u: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return plain(a, u, c), backwards(u, a, c)

    series = Lockstep.series

    def faulty(self: Lockstep, nodes: Any, depth: int = 0) -> Any:
        if not depth and nodes[0].args[-1] == 3:
            raise AttributeError("no such thing")
        return series(self, nodes, depth)

    monkeypatch.setattr(Lockstep, "series", faulty)
    found = found_in(two)
    assert [one.added.stride for one in found.recurrences if isinstance(one.added, Along)] == [1]
    assert [why.reason for why in found.misses] == ["it cannot be read: AttributeError: no such thing"]
    assert all(why.node is not None for why in found.misses)


def _calls_to_read_stream(layers: int) -> int:
    """Calls of functions, Python's and C's, that looking through a stream of unlike layers takes."""

    def stream(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
        for i in range(layers):
            x = x + (torch.softmax(x @ v, -1) @ w if i % 2 else torch.relu(x @ w))
        return x

    graph = graph_of(stream, torch.randn(2, 8), torch.randn(8, 8), torch.randn(8, 8))
    calls = 0

    def counted(_: Any, event: str, __: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        found = recurrences(graph)
    finally:
        sys.setprofile(None)
    assert not found.recurrences
    assert not found.misses
    return calls


def test_work_is_linear_in_residual_additions() -> None:
    few, many, most = (_calls_to_read_stream(layers) for layers in (32, 64, 128))
    assert many - few >= 32, "each layer is looked at"
    assert most - many <= 2.05 * (many - few)


def test_a_loop_between_unlike_residual_additions() -> None:
    """One chain of additions; the part of it that is a loop is found."""

    def stream(a: Tensor, u: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(u[:, 0])
        for scale in (torch.sin, torch.cos, torch.exp):
            x = x + scale(x)
        h, ys = x, []
        for i in range(4):
            h = h + u[:, i]
            ys.append(read(h, c, i))
        for scale in (torch.sin, torch.cos, torch.exp, torch.tanh, torch.relu):
            h = h + scale(h)
        return torch.stack(ys, 1), h

    (one,) = found_in(stream).recurrences
    assert one.steps == 4
    assert one.reads_last
