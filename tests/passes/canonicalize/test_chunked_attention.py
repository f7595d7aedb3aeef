"""Linear attention in chunks: recognised in the spellings of models, trained; look-alikes stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from effopt.compile import record
from tests.passes.canonicalize.chunked_forms import SPELLINGS, Spelled, heads_first, inputs, step_by_step
from tests.passes.canonicalize.gated_masks import segment_sum
from tests.passes.conftest import run_compiled

SIZES = {
    "padded": {},
    "whole chunks": {"t": 16},
    "one chunk": {"t": 5},
    "one entry": {"b": 1},
    "one head": {"h": 1},
    "two chunks of two heads": {"t": 16, "b": 1, "h": 2, "p": 2, "n": 2},
}


def recognised(report: Any) -> int:
    return int(report.counts["recognize-chunked-attention"])


def reasons(report: Any) -> list[str]:
    return [r.reason for r in report.rejected if r.pass_name == "recognize-chunked-attention"]


def assert_near(got: Any, wanted: Any, tolerance: float = 1e-12) -> None:
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def test_the_forms_are_the_recurrence() -> None:
    """What the other tests compare with; the listing is scaled by a step, and so another one."""
    given = inputs()
    for name in ("transformers", "broadcast", "heads first"):
        assert_near(SPELLINGS[name](*given), step_by_step(*given))


@pytest.mark.parametrize("starts", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str, starts: bool) -> None:
    """With a state before the first token, and without, as in the sample of the pass."""
    given = inputs()[: 5 if starts else 4]
    with torch.no_grad():
        out, report = run_compiled(SPELLINGS[name], *given)
        assert_near(out, SPELLINGS[name](*given))
    assert recognised(report) == 1, report.rejected
    (graph,) = report.graphs
    assert graph.ops["linear_attention"] == 1


@pytest.mark.parametrize(
    "size", [s if s in ("one chunk", "one head") else pytest.param(s, marks=pytest.mark.slow) for s in SIZES]
)
def test_sizes(size: str) -> None:
    given = inputs(**SIZES[size])
    form = heads_first if size == "one head" else Spelled()
    with torch.no_grad():
        out, report = run_compiled(form, *given)
        assert_near(out, form(*given))
    assert recognised(report) == 1, report.rejected


def test_without_the_states() -> None:
    """Zeros before the first token, and nobody reads what is left after the last one."""
    given = inputs()[:4]
    with torch.no_grad():
        out, report = run_compiled(lambda *x: Spelled()(*x)[0], *given)
        assert_near([out], Spelled()(*given)[:1])
    assert recognised(report) == 1, report.rejected


def test_gradients() -> None:
    given = inputs()
    found = []
    for form in (lambda *x: run_compiled(Spelled(), *x)[0], Spelled()):
        leaves = [x.clone().requires_grad_() for x in given]
        out, last = form(*leaves)
        found.append(torch.autograd.grad(out.square().sum() + last.sin().sum(), leaves))
    assert_near(*found, tolerance=1e-10)


def test_float32_is_no_worse_than_the_original() -> None:
    """Gates whose sums lose digits in a cumulative sum."""
    given = inputs(t=64)
    given[3][:, ::7] = -300.0
    narrow = [x.float() for x in given]
    with torch.no_grad():
        out, report = run_compiled(Spelled(size=32), *narrow)
        exact, own = step_by_step(*(x.double() for x in narrow)), Spelled(size=32)(*narrow)
    assert recognised(report) == 1
    for got, wanted, old in zip(out, exact, own, strict=True):
        error, before = (float((x - wanted).abs().max()) for x in (got, old))
        assert error <= max(before, 1e-6 * float(wanted.abs().max()))


def test_infinity_stays_behind_its_token() -> None:
    """In the original it spoils what comes before it, by 0 * infinity."""
    given = inputs()
    given[2][1, 10, 2] = torch.inf
    with torch.no_grad():
        (out, last), report = run_compiled(Spelled(), *given)
        wanted, state = step_by_step(*given)
    assert recognised(report) == 1
    seen, kept = wanted.isfinite(), state.isfinite()
    assert bool(out[seen].isfinite().all())
    assert not bool(out[~seen].isfinite().any())
    assert_near([out[seen], last[kept]], [wanted[seen], state[kept]])


def _early(total: Tensor) -> Tensor:
    return torch.exp(total[..., -2:-1] - total)


REFUSED: dict[str, tuple[Spelled, str]] = {
    "pairs: off by one": (Spelled(pairs=lambda g: segment_sum(g, 0).exp()), "off by one"),
    "pairs: no mask": (
        Spelled(pairs=lambda g: (g.cumsum(-1)[..., None] - g.cumsum(-1)[..., None, :]).exp()),
        "every query sees every key",
    ),
    "pairs: gates twice": (Spelled(pairs=lambda g: segment_sum(2 * g).exp()), "than those of the pairs"),
    "pairs: rounded": (Spelled(weights=lambda m: m.to(torch.bfloat16).to(m.dtype)), "what is no product"),
    "pairs: of scores above 0": (Spelled(weights=torch.relu), "what is no product"),
    "pairs: one token a chunk": (Spelled(size=1), "two tokens a chunk"),
    "sums over chunks": (Spelled(total=lambda g: g.cumsum(-2)), "other gates"),
    "a chunk's state: to the last but one": (Spelled(decay_to_end=_early), "to the one where it is read"),
    "a chunk's state: not decayed": (Spelled(decay_to_end=torch.zeros_like), "with 0 decays by gates"),
    "a chunk's state: from its start": (Spelled(decay_to_end=torch.exp), "to the one where it is read"),
    "a chunk's state: of other values": (Spelled(kept=lambda x: x.flip(2)), "not of the keys and values"),
    "carried: off by one": (
        Spelled(carried=lambda total: segment_sum(pad(total[..., -1], (1, 0)), 0).exp()),
        "by the totals of the chunks between",
    ),
    "carried: zeros at the end": (
        Spelled(carried=lambda total: segment_sum(pad(total[..., -1], (0, 1))).exp()),
        "by the totals of the chunks between",
    ),
    "carried: totals of all but the last token": (
        Spelled(carried=lambda total: segment_sum(pad(total[..., -2], (1, 0))).exp()),
        "to the one where it is read",
    ),
    "carried: without decay": (
        Spelled(carried=lambda total: torch.ones_like(segment_sum(pad(total[..., -1], (1, 0)))).tril()), ""
    ),
    "carried: turned": (
        Spelled(carried=lambda total: segment_sum(pad(total[..., -1], (1, 0))).exp().mT),
        "",
    ),
    "read: no decay from the start": (
        Spelled(decay_from_start=lambda total, g: torch.ones_like(total)), "multiplied with 1 decays by gates"
    ),
    "read: without its own gate": (Spelled(decay_from_start=lambda total, g: (total - g).exp()), ""),
    "read: the state behind the chunk": (Spelled(before=lambda states: states[:, 1:]), "of just the chunks"),
    "read: by other queries": (Spelled(reads=lambda c: c.flip(2)), "by other queries"),
    "last: of the chunk before": (Spelled(last=lambda states: states[:, -2]), "also used by"),
    "last: of all chunks": (Spelled(last=lambda states: states * 2), "also used by"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_look_alikes(name: str) -> None:
    form, reason = REFUSED[name]
    given = inputs()
    with torch.no_grad():
        out, report = run_compiled(form, *given)
        assert_near(out, form(*given))
    assert not recognised(report)
    assert not any(graph.faults for graph in report.graphs)
    told = reasons(report)
    assert not reason or any(reason in r for r in told), told


def test_without_what_came_before() -> None:
    """Pairs of tokens in chunks, and a residual: no state is carried."""

    def alone(c: Tensor, b: Tensor, x: Tensor, g: Tensor) -> Tensor:
        c, b, x, g = (y.unflatten(1, (-1, 8)) for y in (c, b, x, g))
        decay = segment_sum(g.permute(0, 3, 1, 2)).exp().permute(0, 2, 3, 4, 1)
        weights = torch.einsum("bclhn,bcshn->bclsh", c, b) * decay
        return torch.einsum("bclsh,bcshp->bclhp", weights, x) + 0.5 * x

    given = inputs(t=24)[:4]
    with torch.no_grad():
        out, report = run_compiled(alone, *given)
        assert_near([out], [alone(*given)])
    assert not recognised(report)
    assert any("no state of the chunks before" in r for r in reasons(report)), report.rejected


def test_weights_that_something_else_reads() -> None:
    kept: list[Tensor] = []

    def form(*given: Tensor) -> Any:
        kept.clear()
        out, last = Spelled(weights=lambda m: kept.append(m) or m)(*given)  # type: ignore[func-returns-value]
        return out, last, kept[0]

    given = inputs()
    with torch.no_grad():
        out, report = run_compiled(form, *given)
        assert_near(out, form(*given))
    assert not recognised(report)
    assert any("is also used by" in r for r in reasons(report)), report.rejected


def _compiled(given: tuple[Tensor, ...], dim: int) -> tuple[Any, Any]:
    for x in given:
        torch._dynamo.mark_dynamic(x, dim)
    torch._dynamo.reset()
    compiled = torch.compile(Spelled(), backend="effopt", options={"lowering": "eager"})
    with torch.no_grad(), record() as report:
        return compiled(*given), report


@pytest.mark.slow
def test_a_symbolic_number_of_entries() -> None:
    given = inputs(t=16)
    out, report = _compiled(given, 0)
    assert_near(out, Spelled()(*given))
    assert recognised(report) == 1, report.rejected


@pytest.mark.slow  # Dynamo takes 10 s to capture what chunks are of symbolic sizes
def test_a_symbolic_length_stays() -> None:
    given = inputs()[:4]
    out, report = _compiled(given, 1)
    assert_near(out, Spelled()(*given))
    assert not recognised(report)
    assert any("symbolic" in r for r in reasons(report)), report.rejected
