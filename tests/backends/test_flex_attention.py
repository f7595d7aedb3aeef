"""FlexAttention as a lowering: equal to the op by Inductor, and its blocks never leave out an open key."""

from __future__ import annotations

import math
import operator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

import effopt
from effopt.backends import flex_attention as flex
from effopt.backends.base import Lowering, choose
from effopt.backends.block_attention import LOWERINGS as BLOCKS
from effopt.backends.flex_attention import LOWERINGS, flex_attention
from effopt.backends.inductor import compile_graph
from effopt.backends.reference import reference_lowering
from effopt.graph import ops
from effopt.graph.ops.attention import open_keys
from effopt.target import Target, target_of
from tests.models.architectures import build

(FLEX,) = LOWERINGS
CPU = target_of(torch.device("cpu"))
B, H, HKV, T, S, D = 2, 4, 2, 300, 330, 16
LOWEST = torch.finfo(torch.float32).min
wants_avx = pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="the CPU kernel wants AVX2"
)
pytestmark = wants_avx
taken = pytest.mark.skipif(
    torch.__version__ < (2, 13),  # type: ignore[operator]  # compares as numbers
    reason="FlexAttention's CPU kernel was checked from torch 2.13 on, and is refused before",
)


def operands(dtype: torch.dtype = torch.float32, t: int = T, dv: int = D) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, H, t, D), (B, HKV, S, D), (B, HKV, S, dv))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def ids() -> dict[str, Tensor]:
    """Two views of one tensor: the kernel must not read one for the other."""
    of_keys = torch.arange(S) // torch.tensor([[70], [111]])
    return {"query_ids": of_keys[:, S - T :], "key_ids": of_keys}


def masks() -> dict[str, dict[str, Any]]:
    drawn = torch.rand(B + 1, H, T + 3, S + 5, generator=torch.Generator().manual_seed(1)) > 0.3
    bias = torch.randn(H, T + 2, S + 3, generator=torch.Generator().manual_seed(2))
    padded = (torch.arange(S) < torch.tensor([[200], [90]]))[:, None, None]
    return {
        "causal": {"is_causal": True},
        "window": {"low": -40, "high": 20},
        "window, soft-cap": {"low": -40, "high": 0, "softcap": 2.0},
        "soft-cap": {"softcap": 2.0},
        "anchors": {"low": -60, "high": 0, "anchors": 3},
        "anchors of two blocks": {"low": 9, "high": 30, "anchors": 140},
        "prefix": {"high": S - T, "prefix": 170},
        "documents": {**ids(), "high": S - T},
        "documents with an anchor": {**ids(), "is_causal": True, "anchors": 2},
        "ids without a batch": {"query_ids": (torch.arange(T) // 60).int(), "key_ids": torch.arange(S) // 60},
        "ids of no order": {"query_ids": torch.arange(T) % 7, "key_ids": torch.arange(S) % 5},
        "padding": {"high": S - T, "mask": padded, "rows_see_key": True},
        "a view of a mask": {"low": -40, "high": 20, "mask": drawn[1:, 1:2, 3:, 5:], "fill": LOWEST},
        "a mask over keys": {"high": S - T, "mask": torch.arange(S) < 200},
        "a view of a bias": {"low": -40, "bias": bias[:, 2:, 3:], "softcap": 4.0},
        "a bias over keys": {"high": 0, "bias": bias[None, :, :1, :S]},
        "rows see nothing": {"high": -150},
        "rows see nothing, zeros": {"high": -150, "zero_masked_rows": True},
        "rows see nothing, mean": {"high": -150, "fill": LOWEST},
        "no key at all": {"low": S},
    }


def compiled(inputs: list[Tensor], kwargs: dict[str, Any]) -> Tensor:
    """The call, and an addition that Inductor would fuse into it."""
    graph, given = Graph(), [*inputs, *(x for x in kwargs.values() if isinstance(x, Tensor))]
    names = [graph.placeholder(f"x{i}") for i in range(len(given))]
    rest = iter(names[3:])
    named = {name: next(rest) if isinstance(x, Tensor) else x for name, x in kwargs.items()}
    call = graph.call_function(flex_attention, tuple(names[:3]), named)
    graph.output((graph.call_function(operator.add, (call, 1.0)),))
    with torch.no_grad():
        (out,) = compile_graph(GraphModule({}, graph), given, {}, "test")(*given)
    return out - 1.0


def expected(inputs: list[Tensor], kwargs: dict[str, Any]) -> Tensor:
    wide = {
        n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in kwargs.items()
    }
    out: Tensor = ops.attention.reference(*(x.double() for x in inputs), **wide)
    return out


FAST = "documents"


@pytest.mark.parametrize(
    "name", [n if n == FAST else pytest.param(n, marks=pytest.mark.slow) for n in masks()]
)
@taken
def test_equals_the_op_by_inductor(name: str) -> None:
    inputs, kwargs = operands(), {"scale": 0.3, **masks()[name]}
    assert FLEX.supports(CPU, ops.attention.bind(tuple(inputs), kwargs)) is None
    got = compiled(inputs, kwargs)
    assert got.shape == (B, H, T, D)
    torch.testing.assert_close(got.double(), expected(inputs, kwargs), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.slow
@taken
def test_a_mask_and_a_bias_that_the_graph_computes() -> None:
    """Inductor would hand the template their expressions, for which it finds no kernel."""
    inputs = operands()
    t, s = inputs[0].shape[2], inputs[1].shape[2]
    given = [*inputs, (torch.arange(t) // 16)[None, None, :, None], (torch.arange(s) // 16)[None, None, None]]
    graph = Graph()
    q, k, v, rows, keys = [graph.placeholder(f"x{i}") for i in range(5)]
    mask = graph.call_function(torch.ops.aten.ge.Tensor, (rows, keys))
    bias = graph.call_function(torch.ops.aten.mul.Tensor, (keys, 0.01))
    settings = {"scale": 0.3, "high": 90, "low": -64, "softcap": 20.0}
    graph.output((graph.call_function(flex_attention, (q, k, v), {"mask": mask, "bias": bias, **settings}),))
    with torch.no_grad():
        (got,) = compile_graph(GraphModule({}, graph), given, {}, "test")(*given)
    known = {"mask": given[3] >= given[4], "bias": given[4] * 0.01}
    wanted = expected(inputs, {**known, **settings})
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@taken
def test_other_dtypes_and_head_sizes(dtype: torch.dtype, tolerance: float) -> None:
    inputs = operands(dtype, dv=24)
    kwargs = {"scale": 0.3, "low": -60, "high": 5, "bias": torch.randn(1, H, 1, S), "softcap": 3.0}
    got = compiled(inputs, kwargs)
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.double(), expected(inputs, kwargs), rtol=tolerance, atol=tolerance, equal_nan=True
    )


@pytest.mark.slow
@taken
def test_operands_that_are_views_of_one_tensor() -> None:
    packed = torch.randn(B, T, 3 * H * D).unflatten(-1, (3 * H, D)).transpose(1, 2)
    inputs, kwargs = list(packed.chunk(3, 1)), {"scale": 0.3, "low": -50, "high": 0}
    torch.testing.assert_close(
        compiled(inputs, kwargs).double(), expected(inputs, kwargs), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", [n for n in masks() if n != "soft-cap"])
def test_blocks_leave_out_no_open_key(name: str) -> None:
    """Blocks left out hold no open key, those that get no mask hold no hidden one; by a band both exactly."""
    kwargs = masks()[name]
    numbers = [kwargs.get(n) for n in ("low", "high", "anchors", "prefix")]
    if kwargs.get("is_causal"):
        numbers[1], numbers[3] = 0, None
    both = (kwargs.get("query_ids"), kwargs.get("key_ids"))
    joined = None if both[0] is None else flex._joined(*both)  # type: ignore[arg-type]
    mask = kwargs.get("mask")
    four = None if mask is None else flex._four_dimensional(mask)
    somewhere, everywhere = flex._Seen(T, S, torch.device("cpu"), *numbers, joined, four).blocks()  # type: ignore[call-arg]
    seen = open_keys(T, S, torch.device("cpu"), numbers[0], numbers[1], *both, numbers[2], numbers[3])
    dense = torch.ones(B, H, T, S, dtype=torch.bool)
    dense = dense if seen is None else dense & seen
    dense = dense if mask is None else dense & mask
    fewest = 3 * 3
    for i in range(3):
        for j in range(3):
            part = dense[:, :, 128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
            some, every = (x.expand(B, H, 3, 3)[:, :, i, j] for x in (somewhere, somewhere & everywhere))
            assert not (part.any(-1).any(-1) & ~some).any()
            assert not (every & ~part.all(-1).all(-1)).any()
            fewest -= int(not some.any())
            if both[0] is None and mask is None and kwargs.get("anchors") is None:
                assert torch.equal(part.any(-1).any(-1), some)
                assert torch.equal(part.all(-1).all(-1), every)
    if name in ("causal", "window", "anchors", "documents", "padding", "rows see nothing", "no key at all"):
        assert fewest < 9, "nothing is skipped"


@taken
def test_it_is_measured_and_not_taken_unasked_where_blocks_run() -> None:
    """It is near enough to be measured; in training it has no backward."""
    bound = ops.attention.bind(tuple(operands()), {"scale": 0.3, **masks()["window"]})
    lowerings = (*BLOCKS, FLEX, reference_lowering(ops.attention))
    asked: list[str] = []

    def measure(near: Any) -> dict[str, float]:
        asked.extend(low.name for low in near)
        return {"flex": 1e-6, "blocks": 2e-6}

    assert choose(lowerings, CPU, bound, bound["query"], False).lowering.name == "blocks"
    assert choose(lowerings, CPU, bound, bound["query"], False, measure=measure).lowering.name == "flex"
    assert "flex" in asked
    refused = dict(choose(lowerings, CPU, bound, bound["query"], True).refused)
    assert "has no backward" in refused["flex"]


@taken
def test_symbols_that_are_refused() -> None:
    """Inductor finds no kernel for them; a window of numbers alone is taken."""
    found: dict[str, list[str]] = {}

    def windowed(q: Tensor, **more: Any) -> Tensor:
        at = torch.arange(q.shape[2])
        keep = (at <= at[:, None]) & (at > at[:, None] - 4)
        if "document" in more:
            keep = keep & (more["document"][:, None, :, None] == more["document"][:, None, None, :])
        return (q @ q.mT).masked_fill(~keep, -math.inf).softmax(-1) @ q

    class Asked:
        @effopt.hookimpl
        def effopt_lowerings(self) -> list[Lowering]:
            def supports(target: Target, operands: Any) -> str:
                found.setdefault(name, []).append(str(FLEX.supports(target, operands)))
                return "only asked"

            return [Lowering(ops.attention, "asked", flex_attention, supports, lambda *_: 0.0)]

    options: Any = {"plugins": [Asked()]}
    more = {"document": torch.zeros(2, 40, dtype=torch.int64)}
    for name, given, sizes in (  # noqa: B007  # `supports` reads it
        ("numbers", {}, (2,)),
        ("heads", {}, (1, 2)),
        ("ids", more, (2,)),
    ):
        torch._dynamo.reset()
        q = torch.randn(2, 3, 40, 8)
        for size in sizes:
            torch._dynamo.maybe_mark_dynamic(q, size)
        for x in given.values():
            torch._dynamo.maybe_mark_dynamic(x, 1)
        with torch.no_grad():
            torch.compile(windowed, backend="effopt", options=options)(q, **given)
    assert found["numbers"] == ["None"]
    assert "the number of heads" in found["heads"][0]
    assert "sizes that are symbols, and ids" in found["ids"][0]


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True])
@taken
def test_in_a_model_whose_layers_are_outlined(dynamic: bool | None) -> None:
    """Windows of mistral; by symbolic sizes also for other lengths than that of the first call."""

    class Preferred:
        @effopt.hookimpl
        def effopt_lowerings(self) -> list[Lowering]:
            return [Lowering(ops.attention, "preferred", flex_attention, FLEX.supports, lambda *_: 0.0)]

    torch._dynamo.reset()
    model, inputs = build("mistral", "sdpa", length=40)
    lengths = (40, 23, 61) if dynamic else (40,)
    with torch.no_grad(), effopt.record() as report:
        options: Any = {"plugins": [Preferred()]}
        run = torch.compile(model, backend="effopt", dynamic=dynamic, options=options)
        for n in lengths:
            tokens = {"input_ids": inputs["input_ids"][:, :1].repeat(1, n) + torch.arange(n) % 5}
            torch.testing.assert_close(run(**tokens).logits, model(**tokens).logits, rtol=1e-4, atol=1e-5)
    assert {r.kernel for g in report.graphs for r in g.lowerings if r.op == "attention"} == {"preferred"}
    assert report.graphs[0].outlined
