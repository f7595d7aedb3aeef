"""Selectors: what they choose, exact where they choose all, and real models at prefill and in generate()."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import effopt
from effopt.compile import effopt as backend
from effopt.graph import ops
from effopt.graph.ops.antidiagonal_blocks import blocks_before, fewest_blocks
from effopt.passes.plan import Entry, PlannedSites, Section
from tests.models.architectures import build
from tests.passes.conftest import run_compiled

ALL = (
    "select-blocks-by-antidiagonal{block=16,least=32,threshold=1.0}",
    "keep-sink-and-local-blocks{block=16,least=32,window=4096}",
    "stride-blocks-by-head{block=16,least=32,stride=1}",
)
SOME = (
    "select-blocks-by-antidiagonal{block=16,least=32,threshold=0.5}",
    "keep-sink-and-local-blocks{block=16,least=32,sink=8,window=16}",
    "stride-blocks-by-head{block=16,least=32,stride=4,window=16}",
)


def test_antidiagonals_by_hand() -> None:
    """The mass of each block, from all scores."""
    t, stride, block = 48, 4, 16
    q, k = (torch.randn(1, 1, t, 8, dtype=torch.float64) for _ in range(2))
    scores = (q @ k.mT)[0, 0]
    cells = torch.full((t // stride, t // stride), -torch.inf, dtype=torch.float64)
    for i in range(t // stride):
        for j in range(i + 1):
            part = scores[i * stride : (i + 1) * stride, j * stride : (j + 1) * stride]
            cells[i, j] = sum(part[a, stride - 1 - a] for a in range(stride)) * 0.3 / stride
    mass = cells.softmax(-1).reshape(3, 4, 3, 4).sum((1, 3))
    want = (fewest_blocks(mass, 0.6) | torch.eye(3, dtype=torch.bool)) & blocks_before(3, 3, q.device)
    got = ops.antidiagonal_blocks.reference(
        q, k, block=block, stride=stride, threshold=0.6, scale=0.3, is_causal=True
    )
    assert torch.equal(got[0, 0], want)


def test_fewest_blocks() -> None:
    mass = torch.tensor([[0.1, 0.6, 0.3], [0.2, 0.2, 0.6]])
    assert fewest_blocks(mass, 0.5).tolist() == [[False, True, False], [False, False, True]]
    assert fewest_blocks(mass, 0.85).tolist() == [[False, True, True], [True, True, True]]
    assert fewest_blocks(torch.zeros(1, 3), 0.9).tolist() == [[False, False, False]]


def test_heads_cover_the_context_together() -> None:
    q = torch.empty(1, 4, 200, 1)
    blocks = ops.strided_blocks.reference(q, q, block=16, stride=4, window=1)
    assert torch.equal(blocks.any(1)[0], blocks_before(13, 13, q.device))
    assert float(blocks.double().mean()) < 0.3


def test_sink_and_window_hold_what_they_promise() -> None:
    q = torch.empty(1, 1, 100, 1)
    blocks = ops.local_blocks.reference(q, q, block=16, sink=5, window=20, is_causal=True)[0, 0]
    for query in range(100):
        for key in range(query + 1):
            if key < 5 or query - key < 20:
                assert blocks[query // 16, key // 16]
    assert not blocks[6, 1:4].any()


def test_regions_are_the_nearest_means() -> None:
    q, k = torch.randn(2, 4, 70, 8), torch.randn(2, 2, 70, 8)
    blocks = ops.region_blocks.reference(q, k, block=16, count=2)
    assert blocks.sum(-1).eq(2).all()
    ends = [(i * 16, min(70, i * 16 + 16)) for i in range(5)]
    means = torch.stack([k[1, 1, a:b].mean(0) for a, b in ends])
    best = (means @ q[1, 2, 64:70].mean(0)).topk(2).indices
    assert sorted(best.tolist()) == blocks[1, 2, 4].nonzero().flatten().tolist()


MODELS = [("llama", "sdpa", 0), ("llama", "eager", 1), ("gpt2", "sdpa", 2), ("gpt2", "eager", 0)]


@pytest.mark.parametrize(("name", "attention", "number"), MODELS)
def test_all_blocks_are_the_model_and_some_are_the_op(name: str, attention: str, number: int) -> None:
    model, _ = build(name, attention)
    ids = torch.randint(3, 100, (2, 60))

    def run(spec: str, lowering: str = "eager") -> tuple[torch.Tensor, Any]:
        return run_compiled(model, ids, passes=spec, lowering=lowering, verify="off")

    with torch.no_grad():
        want = model(ids).logits
        got, report = run(ALL[number])
        assert report.ops["block_sparse_attention"] > 0
        assert report.ops["attention"] == 0
        torch.testing.assert_close(got.logits, want, rtol=1e-4, atol=1e-5)
        got, report = run(SOME[number])
        assert report.ops["block_sparse_attention"] > 0
        assert (got.logits - want).abs().max() > 1e-4


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize(("name", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa")])
def test_generate_with_all_blocks_gives_eagers_tokens(name: str, attention: str, padded: bool) -> None:
    model, _ = build(name, attention, use_cache=True)
    ids = torch.randint(3, 100, (2, 50))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :19] = 0
    settings = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    want = model.generate(ids, disable_compile=True, **settings)
    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    with effopt.record() as report:
        compiled.forward = torch.compile(
            compiled.forward, backend=backend, options={"passes": ALL[0], "lowering": "eager"}
        )
        got = compiled.generate(ids, disable_compile=True, **settings)
    assert got.tolist() == want.tolist()
    first, *steps = report.graphs
    assert first.ops["block_sparse_attention"] > 0
    assert steps
    for step in steps:
        assert step.ops["block_sparse_attention"] == 0
        assert any("a decoding step reads all keys" in r.reason for r in step.rejected)


def test_a_plan_of_prefill_fits_the_decode_graphs() -> None:
    model, _ = build("llama", "sdpa", use_cache=True)
    ids = torch.randint(3, 100, (1, 60))
    form = {"block": 16, "threshold": 0.5, "stride": 8}
    paths = (f"model.layers.{i}.self_attn" for i in range(model.config.num_hidden_layers))
    entries = tuple(Entry(path, "attention [4 heads of 16]", form) for path in paths)
    plan = effopt.Plan((Section(SOME[0], graphs=(PlannedSites(entries),)),))
    settings = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "disable_compile": True}
    tokens = []
    for options in ({"passes": SOME[0]}, {"plans": plan}):
        torch._dynamo.reset()
        twin = copy.deepcopy(model)
        twin.forward = torch.compile(twin.forward, backend=backend, options={**options, "lowering": "eager"})
        tokens.append(twin.generate(ids, attention_mask=torch.ones_like(ids), **settings).tolist())
    assert tokens[0] == tokens[1]


def test_a_guard_parts_long_calls_from_short_ones() -> None:
    def run(q: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)

    torch._dynamo.reset()
    spec = "keep-sink-and-local-blocks{block=16,least=64,sink=0,window=1}"
    options: Any = {"passes": spec, "lowering": "eager"}
    compiled = torch.compile(run, backend=backend, dynamic=True, options=options)
    found = {}
    with torch.no_grad():
        for t in (100, 40, 70, 63):
            q = torch.randn(1, 2, t, 8)
            found[t] = bool(torch.allclose(compiled(q), run(q), atol=1e-5))
    assert found == {100: False, 40: True, 70: False, 63: True}


def test_the_cpu_kernel_runs_under_inductor() -> None:
    def run(q: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True) + 1.0

    q = torch.randn(1, 2, 300, 8)
    spec = "keep-sink-and-local-blocks{block=16,sink=8,window=64}"
    with torch.no_grad():
        got, report = run_compiled(run, q, passes=spec, lowering="auto")
        want, _ = run_compiled(run, q, passes=spec, lowering="reference")
    kernels = {low.kernel for low in report.graphs[0].lowerings if low.op == "block_sparse_attention"}
    assert kernels == {"selected-blocks"}
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
