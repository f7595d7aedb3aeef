"""Any pool, table and lengths: the compiled function gives what eager gives in float64; and all lowerings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from effopt import pipeline as pipelines
from effopt.compile import record
from effopt.graph.in_place import write_in_place
from effopt.graph.values import MUTATED
from effopt.passes.base import Example
from effopt.plugins.manager import build_registry
from effopt.testing import capture_example, run_passes
from tests.passes.attention.paged_cases import (
    HKV,
    LAYOUTS,
    LENGTHS,
    NAME,
    PAGE,
    POOL,
    TABLE,
    VALUES,
    B,
    D,
    Function,
    Q,
    by_index,
    over,
    reasons,
)
from tests.passes.conftest import run_compiled


@dataclass(frozen=True)
class Case:
    """One call: sizes, how keys are gathered and how rows without keys come out."""

    b: int
    hkv: int
    group: int
    t: int
    page: int
    columns: int
    lay_out: Function
    is_softmax: bool
    more: int
    """By which the mask is off the lengths: it is kept."""
    table: tuple[int, ...]
    lengths: tuple[int, ...]

    def run(self, q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        k, v = (self.lay_out(x, table) for x in (keys, values))
        if k.shape[1] != q.shape[1]:
            k, v = (x.repeat_interleave(self.group, 1) for x in (k, v))
        rows = torch.arange(self.t)[:, None] + (lengths.view(-1, 1, 1, 1) - self.t + self.more)
        seen = torch.arange(k.shape[2]) <= rows
        if not self.is_softmax:
            return F.scaled_dot_product_attention(q, k, v, seen)
        return (q @ k.mT).masked_fill(~seen, -math.inf).softmax(-1) @ v

    def inputs(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(len(self.table))
        q = torch.randn(self.b, self.hkv * self.group, self.t, 4, generator=generator)
        pools = torch.randn(2, 6, self.page, self.hkv, 4, generator=generator)
        table = torch.tensor(self.table).view(self.b, self.columns)
        return [q, *pools, table, torch.tensor(self.lengths)]


GENERAL = [f for f in LAYOUTS if f.__name__ not in ("transposed_channels", "repeated_late", "repeated_early")]
"""Those whose code names no size."""


@st.composite
def cases(draw: st.DrawFn) -> Case:
    b, page, columns = (draw(st.integers(1, most)) for most in (3, 5, 4))
    lay_out = draw(st.sampled_from(GENERAL))
    lowest = -6 if lay_out is by_index else 0  # elsewhere an error in eager
    return Case(
        b,
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        page,
        columns,
        lay_out,
        draw(st.booleans()),
        draw(st.integers(-1, 1)),
        tuple(draw(st.lists(st.integers(lowest, 5), min_size=b * columns, max_size=b * columns))),
        tuple(draw(st.lists(st.integers(-1, page * columns + 2), min_size=b, max_size=b))),
    )


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_as_eager_in_float64(case: Case) -> None:
    """The checks of rewrites are switched off: the proof alone must hold."""
    inputs = case.inputs()
    with torch.no_grad():
        got, report = run_compiled(case.run, *(x.clone() for x in inputs), dynamic=False, verify="off")
        want = case.run(*(x.double() if x.is_floating_point() else x for x in inputs))
    assert not report.faults
    if case.page * case.columns > 1:  # of one key a mask has no axis to prove a length along
        assert report.counts[NAME] == 1, reasons(report)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize(
    ("lowering", "columns", "kernel"),
    [("auto", 3, "gathered"), ("auto", 128, "by-request"), ("reference", 3, "reference")],
)
def test_through_inductor(lowering: str, columns: int, kernel: str, t: int) -> None:
    """Few keys are gathered at once, many request by request; pages below 0 are those from the end."""
    torch._dynamo.reset()

    def run(q: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        k, v = (by_index(x, table) for x in (keys, values))
        rows = lengths.view(-1, 1, 1, 1) - t + torch.arange(t)[:, None]
        return F.scaled_dot_product_attention(q, k, v, torch.arange(k.shape[2]) <= rows, enable_gqa=True)

    keys, values = torch.randn(2, 2 * columns, 16, 4, 64)
    table = torch.randperm(2 * columns).view(2, columns) - 2 * columns
    inputs = torch.randn(2, 8, t, 64), keys, values, table, torch.tensor([1, 15 * columns])
    with record() as report, torch.no_grad():
        got = torch.compile(run, backend="effopt", fullgraph=True, options={"lowering": lowering})(*inputs)
        torch.testing.assert_close(got, run(*inputs), rtol=1e-4, atol=1e-5)
    assert report.counts[NAME] == 1
    assert [r.kernel for r in report.lowerings] == [kernel]


def test_nothing_is_gathered_any_more() -> None:
    trial = capture_example(Example(over(by_index), (Q, POOL, VALUES, TABLE, LENGTHS)))
    run_passes(trial, pipelines.build(build_registry()))
    trial.module.graph.eliminate_dead_code()
    targets = {node.target for node in trial.module.graph.nodes}
    assert torch.ops.effopt.paged_attention.default in targets
    assert torch.ops.aten.index.Tensor not in targets
    assert torch.ops.aten.arange.default not in targets  # nor is there a mask


def test_a_pool_that_a_step_writes_is_not_copied() -> None:
    """The op reads the new pool, so that the row is written where it lies."""

    def step(q: Tensor, new: Tensor, pool: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        pool.index_put_((table[:, -1], lengths % PAGE), new)
        return over(by_index)(q, pool, pool, table, lengths + 1)

    new = torch.randn(B, HKV, D)
    trial = capture_example(Example(step, (Q, new, POOL.clone(), TABLE, LENGTHS)))
    run_passes(trial, pipelines.build(build_registry()))
    graph = trial.module.graph
    write_in_place(graph, graph.output_node().meta[MUTATED])
    (written,) = graph.find_nodes(op="call_function", target=torch.ops.aten.index_put_.default)
    assert written.args[0].op == "placeholder"
    assert graph.find_nodes(op="call_function", target=torch.ops.effopt.paged_attention.default)
