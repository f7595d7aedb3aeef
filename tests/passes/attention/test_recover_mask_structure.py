"""What a mask proves becomes numbers and ids of the attention; the rest stays, and the result is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from effopt.compile import effopt, record
from effopt.graph import ops
from effopt.passes.attention.recover_mask_structure import RecoverMaskStructure
from effopt.plugins.hookspec import hookimpl
from tests.passes.conftest import run_compiled

INF, LOWEST = float("inf"), torch.finfo(torch.float32).min
NAME = RecoverMaskStructure.name
Q = torch.randn(2, 4, 12, 8, generator=torch.Generator().manual_seed(0))


class Spy:
    """Notes the keyword arguments of each attention at the end of the pipeline."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    @hookimpl(wrapper=True)
    def effopt_run_pass(self, pass_: Any, module: Any, context: Any) -> Any:
        result = yield
        if pass_.name == "prove-rows-see-key":
            nodes = [n for n in module.graph.nodes if n.target is ops.attention.overload]
            self.found = [dict(n.kwargs) for n in nodes]
        return result


def told(
    function: Callable[..., Tensor], *inputs: Tensor, dynamic: bool | None = None
) -> tuple[dict[str, Any], Any]:
    """What the one attention of a function is told, and the report; its result is checked."""
    spy = Spy()
    with torch.no_grad():
        out, report = run_compiled(
            function, *inputs, dynamic=dynamic, plugins=[spy], disable=["split-attention-by-axis"]
        )
    torch.testing.assert_close(out, function(*inputs), rtol=1e-5, atol=1e-5, equal_nan=True)
    (kwargs,) = spy.found
    return kwargs, report


def masked(keep: Callable[..., Tensor], fill: float = -INF) -> Callable[..., Tensor]:
    return lambda q, *given: torch.where(keep(q.shape[2], *given), q @ q.mT, fill).softmax(-1) @ q


def added(keep: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """By a literal: a number of a closure is a symbol in a graph of symbolic sizes."""

    def attend(q: Tensor, *given: Tensor) -> Tensor:
        hidden = torch.where(keep(q.shape[2], *given), 0.0, -3.4028234663852886e38)
        return (q @ q.mT + hidden).softmax(-1) @ q

    return attend


def window(n: int) -> Tensor:
    at = torch.arange(n)
    return (at <= at[:, None]) & (at > at[:, None] - 4)


def padded(n: int, seen: Tensor) -> Tensor:
    return window(n) & seen[:, None, None, :]


SEEN = torch.arange(12) >= torch.tensor([[0], [5]])
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 7, [2] * 3 + [0] * 6 + [2] * 3])


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("spelled", [masked, added])
def test_window(spelled: Any, dynamic: bool | None) -> None:
    kwargs, report = told(spelled(window), Q, dynamic=dynamic)
    assert (kwargs["low"], kwargs["high"]) == (-3, 0)
    assert kwargs["rows_see_key"]
    assert not {"mask", "bias", "query_ids"} & set(kwargs)
    assert [a.note for a in report.applied if a.pass_name == NAME] == ["keys -3 .. 0 of the query"]


@pytest.mark.parametrize("spelled", [masked, added])
def test_padding_stays_without_the_queries(spelled: Any) -> None:
    """Rows of the second entry see no key: they keep what they had, NaN or the mean."""
    kwargs, _ = told(spelled(padded), Q, SEEN)
    assert (kwargs["low"], kwargs["high"]) == (-3, 0)
    assert "bias" not in kwargs
    assert kwargs["mask"].meta["val"].shape == (2, 1, 1, 12)
    assert not kwargs.get("rows_see_key")
    assert kwargs["fill"] == (-INF if spelled is masked else LOWEST)


@pytest.mark.parametrize("dynamic", [None, True])
def test_documents(dynamic: bool | None) -> None:
    def same(n: int, document: Tensor) -> Tensor:
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        return (document[:, None, :, None] == document[:, None, None, :]) & causal

    kwargs, _ = told(added(same), Q, DOCUMENTS, dynamic=dynamic)
    assert kwargs["high"] == 0
    assert "mask" not in kwargs
    assert kwargs["rows_see_key"]
    assert kwargs["query_ids"] is kwargs["key_ids"]


def test_chunks() -> None:
    def chunks(n: int) -> Tensor:
        at = torch.arange(n)
        return (at // 4 == at[:, None] // 4) & (at <= at[:, None])

    kwargs, report = told(masked(chunks), Q)
    assert kwargs["high"] == 0
    assert [tuple(kwargs[n].meta["val"].shape) for n in ("query_ids", "key_ids")] == [(1, 12), (1, 12)]
    assert any("chunks of 4" in a.note for a in report.applied)


def test_chunks_from_the_first_key_that_counts() -> None:
    """As `transformers` chunks rows that are padded on the left."""

    def chunks(n: int, first: Tensor) -> Tensor:
        at = torch.arange(n) - first[:, None, None, None]
        return at // 4 == at.mT // 4

    kwargs, _ = told(masked(chunks), Q, torch.tensor([0, 3]))
    assert kwargs["query_ids"].meta["val"].shape == (2, 12)


def test_what_a_bias_adds_stays() -> None:
    slopes = torch.rand(4)

    def alibi(q: Tensor, slopes: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])
        hidden = torch.where(at <= at[:, None], 0.0, LOWEST)
        return (q @ q.mT + slopes[:, None, None] * at + hidden).softmax(-1) @ q

    kwargs, report = told(alibi, Q, slopes)
    assert kwargs["high"] == 0
    assert kwargs["bias"].meta["val"].shape == (1, 4, 1, 12)
    assert any("alibi) stays a tensor" in a.note for a in report.applied)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("spelled", [masked, added])
def test_first_keys_that_a_band_does_not_hide(spelled: Any, dynamic: bool | None) -> None:
    def anchored(n: int) -> Tensor:
        at = torch.arange(n)
        return (at <= at[:, None]) & ((at < 2) | (at[:, None] - at < 4))

    kwargs, report = told(spelled(anchored), Q, dynamic=dynamic)
    assert [kwargs.get(n) for n in ("low", "high", "anchors", "prefix")] == [-3, 0, 2, None]
    assert "mask" not in kwargs
    assert kwargs["rows_see_key"]
    assert any("the first 2 of those behind too" in a.note for a in report.applied)

    def prefixed(n: int) -> Tensor:
        at = torch.arange(n)
        return (at < 3) | (at <= at[:, None])

    kwargs, report = told(spelled(prefixed), Q, dynamic=dynamic)
    assert [kwargs.get(n) for n in ("low", "high", "anchors", "prefix")] == [None, 0, None, 3]
    assert any("the first 3 of those ahead too" in a.note for a in report.applied)


def test_documents_with_an_anchor() -> None:
    def anchored(n: int, document: Tensor) -> Tensor:
        same = (document[:, None, :, None] == document[:, None, None, :]) | (torch.arange(n) == 0)
        return same & torch.ones(n, n, dtype=torch.bool).tril()

    kwargs, _ = told(added(anchored), Q, DOCUMENTS)
    assert (kwargs["high"], kwargs["anchors"]) == (0, 1)
    assert kwargs["query_ids"] is kwargs["key_ids"]
    assert "mask" not in kwargs


def test_anchors_of_documents_are_not_those_of_a_window() -> None:
    """Documents have an anchor, and the window has none: one of the two stays a mask."""

    def both(n: int, document: Tensor) -> Tensor:
        at = torch.arange(n)
        same = (document[:, None, :, None] == document[:, None, None, :]) | (at == 0)
        return same & (at <= at[:, None]) & (at > at[:, None] - 4)

    kwargs, _ = told(masked(both), Q, DOCUMENTS)
    assert (kwargs["low"], kwargs["high"]) == (-3, 0)
    assert "anchors" not in kwargs
    assert kwargs["mask"].meta["val"].shape == (2, 1, 12, 12)


def test_one_query_over_a_cache_of_fixed_length() -> None:
    """What a static cache has not written yet is told by a value: a mask over keys, that kernels look at."""

    def step(q: Tensor, k: Tensor, past: Tensor) -> Tensor:
        keep = torch.arange(k.shape[2]) <= past[:, None]
        return (q @ k.mT + torch.where(keep, 0.0, LOWEST)).softmax(-1) @ k

    kwargs, _ = told(step, Q[:, :, :1], Q, torch.tensor([4]))
    assert "bias" not in kwargs
    assert kwargs["mask"].meta["val"].shape[-2:] == (1, 12)
    assert kwargs["fill"] == LOWEST


def test_open_everywhere() -> None:
    kwargs, report = told(masked(lambda n: torch.arange(n) < n), Q)
    assert not {"mask", "low", "high", "fill"} & set(kwargs)
    assert any("every key is open" in a.note for a in report.applied)


def test_cache_that_grows() -> None:
    """The last query sees all keys; before it, one key fewer for each."""

    def cached(q: Tensor, k: Tensor) -> Tensor:
        t, s = q.shape[2], k.shape[2]
        keep = torch.arange(s) <= torch.arange(t)[:, None] + (s - t)
        return (q @ k.mT).masked_fill(~keep, -INF).softmax(-1) @ k

    kwargs, _ = told(cached, Q[:, :, :5], Q, dynamic=True)
    assert str(kwargs["high"].meta["val"]) != ""
    assert "mask" not in kwargs
    kwargs, _ = told(cached, Q[:, :, :1], Q)
    assert not {"mask", "low", "high"} & set(kwargs)


def reason(function: Callable[..., Tensor], *inputs: Tensor) -> str:
    kwargs, report = told(function, *inputs)
    assert not {"low", "high", "query_ids"} & set(kwargs), kwargs
    return next(r.reason for r in report.rejected if r.pass_name == NAME)


def test_what_stays_a_tensor() -> None:
    keep = torch.rand(12, 12) > 0.5
    keep[:, 0] = True
    assert "(an input), which is not read further" in reason(masked(lambda n, keep: keep), Q, keep)
    padding = masked(lambda n, seen: seen[:, None, None, :])
    assert "padding of the keys" in reason(padding, Q, SEEN)
    lengths = masked(lambda n, k: torch.arange(n) < k[:, None, None, None])
    assert "lengths of the keys" in reason(lengths, Q, torch.tensor([3, 12]))
    prefix = masked(
        lambda n, k: (
            (torch.arange(n) < k[:, None, None, None]) | (torch.arange(n) <= torch.arange(n)[:, None])
        )
    )
    assert "a prefix that all queries see" in reason(prefix, Q, torch.tensor([3, 12]))
    table = lambda q, w: (q @ q.mT + w[torch.arange(12)[:, None] - torch.arange(12) + 11]).softmax(-1) @ q  # noqa: E731
    assert "relative table" in reason(table, Q, torch.randn(23))


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[list[Tensor], Any]:
    """Gradients of all floating inputs, by effopt without Inductor."""
    torch._dynamo.reset()
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    with record() as report:
        backend = lambda module, given: effopt(module, given, options={"lowering": "eager"})  # noqa: E731
        out = torch.compile(function, backend=backend, fullgraph=True)(*leaves)
    direction = torch.linspace(-1, 2, out.numel()).cos().view(out.shape)
    return list(torch.autograd.grad((out * direction).sum(), [x for x in leaves if x.requires_grad])), report


def test_training_keeps_the_gradient_of_rows_that_a_bias_hides() -> None:
    function = added(padded)
    (got,), report = gradients(function, Q, SEEN)
    q = Q.clone().requires_grad_()
    out = function(q, SEEN)
    direction = torch.linspace(-1, 2, out.numel()).cos().view(out.shape)
    torch.testing.assert_close(got, torch.autograd.grad((out * direction).sum(), q)[0], rtol=1e-4, atol=1e-4)
    assert report.counts[NAME] == 0
    assert any("in training its scores get a gradient" in r.reason for r in report.rejected)
    (got,), report = gradients(masked(padded, LOWEST), Q, SEEN)
    assert report.counts[NAME] == 1


def test_blocks_of_keys_through_the_compiler() -> None:
    """Long enough for the kernel that skips: chosen, and right, with its gradients."""
    q = torch.randn(1, 2, 1024, 16, requires_grad=True)
    function = added(window)
    torch._dynamo.reset()
    with record() as report:
        out = torch.compile(function, backend="effopt", fullgraph=True)(q)
    assert [low.kernel for g in report.graphs for low in g.lowerings] == ["blocks"]
    wanted = function(q)
    torch.testing.assert_close(out, wanted, rtol=2e-5, atol=2e-5)
    direction = torch.randn_like(out)
    got, right = (torch.autograd.grad((x * direction).sum(), q)[0] for x in (out, wanted))
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)
