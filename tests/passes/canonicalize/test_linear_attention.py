"""Linear attention in the spellings of models: recognised, run in chunks, trained."""

from __future__ import annotations

import pytest
import torch

from effopt.backends.chunked_linear_attention import chunked_linear_attention
from effopt.compile import record
from effopt.graph import ops
from tests.passes.canonicalize.linear_attention_cases import (
    BUFFERS,
    SPELLINGS,
    Held,
    Layer,
    T,
    cumulative_rows,
    recognised,
    retention,
)
from tests.passes.conftest import run_compiled


@pytest.mark.parametrize("name", SPELLINGS)
def test_inference_and_training(name: str) -> None:
    torch.manual_seed(0)
    layer, x = Layer(SPELLINGS[name]), torch.randn(2, T, 8)
    with torch.no_grad():
        out, report = run_compiled(layer, x)
        torch.testing.assert_close(out, layer(x), rtol=2e-5, atol=2e-5)
    assert recognised(report) == (2 if name == "normalised" else 1), report.rejected
    out, report = run_compiled(layer, x)
    assert recognised(report) >= 1
    leaves = list(layer.parameters())
    found = [torch.autograd.grad(y.square().sum(), leaves, allow_unused=True) for y in (out, layer(x))]
    for got, wanted in zip(*found, strict=True):
        if wanted is None:
            assert got is None
        else:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", BUFFERS)
def test_mask_in_a_buffer(name: str) -> None:
    """Recognised under a guard; what is written into the buffer later holds."""
    layer, x = Layer(Held(*BUFFERS[name])), torch.randn(2, T - 3, 8)
    with torch.no_grad(), record() as report:
        compiled = torch.compile(layer, backend="effopt", options={"lowering": "eager"})
        torch.testing.assert_close(compiled(x), layer(x), rtol=2e-5, atol=2e-5)
        assert recognised(report) == 1, report.rejected
        layer.attend.mask[..., 5, 2] = 0 if "hidden" not in name else 1
        torch.testing.assert_close(compiled(x), layer(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("lowering", ["eager", "auto"])
@pytest.mark.parametrize("t", [6, 1200])
def test_a_cumulative_sum_keeps_infinity_from_what_comes_before(t: int, lowering: str) -> None:
    """As in eager mode, which takes no 0 * infinity; short calls are the reference, long ones chunks."""
    q, k, v = (torch.randn(1, 2, t, 4) for _ in range(3))
    v[:, :, -1], v[0, 1, t // 2, 0] = torch.inf, torch.nan
    call = lambda q, k, v: cumulative_rows(q, k, v, q)  # noqa: E731
    out, report = run_compiled(call, q, k, v, lowering=lowering)
    wanted = call(q, k, v)
    assert recognised(report) == 1
    seen = wanted.isfinite()
    assert torch.equal(out.isfinite(), seen)
    assert bool(seen[:, :, : t // 2].all())
    torch.testing.assert_close(out[seen], wanted[seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["triangle", "retention", "cumulative"])
def test_dynamic_lengths(name: str) -> None:
    layer = Layer(SPELLINGS[name])
    compiled = torch.compile(layer, backend="effopt", options={"lowering": "eager"}, dynamic=True)
    with torch.no_grad():
        for t in (T, 9, 130):
            x = torch.randn(2, t, 8)
            torch.testing.assert_close(compiled(x), layer(x), rtol=2e-5, atol=2e-5)


def test_under_inductor_long_sequences_run_in_chunks() -> None:
    layer, x = Layer(retention), torch.randn(1, 1200, 8)
    with torch.no_grad():
        out, report = run_compiled(layer, x, lowering="auto")
        torch.testing.assert_close(out, layer(x), rtol=2e-5, atol=2e-5)
    (lowered,) = (low for graph in report.graphs for low in graph.lowerings if low.op == "linear_attention")
    assert lowered.kernel == "chunked"


def test_a_decode_loop_is_the_parallel_form() -> None:
    """A prompt in chunks, then token by token with the state that it left."""
    q, k, v = (torch.randn(1, 2, 40, 8, dtype=torch.float64) for _ in range(3))
    decay = -torch.rand(2, dtype=torch.float64)
    whole, last = ops.linear_attention.reference(q, k, v, scale=0.3, decay=decay)
    head = [x[:, :, :33] for x in (q, k, v)]
    out, state = chunked_linear_attention(*head, scale=0.3, decay=decay)
    parts = [out]
    for i in range(33, 40):
        token = [x[:, :, i : i + 1] for x in (q, k, v)]
        out, state = torch.ops.effopt.linear_attention(*token, scale=0.3, decay=decay, state=state)
        parts.append(out)
    torch.testing.assert_close((torch.cat(parts, 2), state), (whole, last))
