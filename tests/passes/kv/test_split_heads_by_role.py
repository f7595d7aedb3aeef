"""Streaming heads equal the eager twin: at every position, token for token, over every kind of cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import effopt
from effopt.graph import ops
from effopt.graph.rewrite import PassResult
from effopt.passes.kv.split_heads_by_role import SplitHeadsByRole
from tests.models.architectures import sampled
from tests.models.eager_twin import relative
from tests.models.streaming_twin import seen_by
from tests.passes.kv.models import Look, compiled
from tests.passes.kv.streaming_cases import NAME, RECENT, SINK, batch, case, decisions, small
from tests.test_caches import generate, kv_bytes, model_of, ordinary, prompt


@pytest.mark.parametrize("name", sampled(["llama", "qwen3", "gpt2", "mixtral"], "llama", "gpt2"))
def test_prefill_equals_the_twin_at_every_position(name: str) -> None:
    model, plan, twin = case(name)
    ids, mask = prompt()
    look = Look()
    run = compiled(model, look, plans=plan)
    with torch.no_grad():
        plain = batch()
        assert relative(run(**plain).logits, twin(**plain).logits) < 1e-5
        assert relative(model(**plain).logits, twin(**plain).logits) > 1e-2
        got, want = (f(ids, attention_mask=mask, use_cache=False).logits for f in (run, twin))
    assert relative(got[mask.bool()], want[mask.bool()]) < 1e-5
    nodes = [n for n in look.seen[0].graph.nodes if n.target is ops.attention.overload]
    assert len(nodes) == 3  # two of a split layer, one of a layer whose heads all stream
    bands = [n.kwargs for n in nodes if "anchors" in n.kwargs]
    assert [(k["low"], k["anchors"]) for k in bands] == [(1 - RECENT, SINK)] * 2


@pytest.mark.parametrize("made_by", sampled(["transformers", "cache_for"], "cache_for"))
@pytest.mark.parametrize("length", [None, 40], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", sampled(["llama", "qwen3", "gpt2"], "llama"))
def test_generate(name: str, length: int | None, made_by: str) -> None:
    model, plan, twin = case(name)
    full = ordinary(twin, length)
    expected = generate(twin, full)
    assert expected != generate(copy.deepcopy(model), ordinary(model, length))
    cache = ordinary(model, length)
    if made_by == "cache_for":
        cache = effopt.cache_for(model, plan, max_cache_len=length)
    torch._dynamo.reset()
    look = Look()
    model.forward = compiled(model.forward, look, plans=plan)
    with effopt.record() as report:
        assert generate(model, cache) == expected
    assert not report.faults
    assert not [g.refused for g in report.graphs if g.refused]
    assert not any(look.count("split_cache"))
    assert len(look.seen) <= 3  # prefill, decode, decode of any length
    if made_by == "cache_for":
        assert int(cache.get_seq_length()) == int(full.get_seq_length())
        assert held_bytes(cache) == expected_bytes(plan, full)
        cache.reset()
        assert generate(model, cache) == expected


@pytest.mark.slow
@pytest.mark.parametrize("length", [None, 40], ids=["dynamic", "static"])
def test_generate_through_inductor(length: int | None) -> None:
    model, plan, twin = case("llama")
    expected = generate(twin, ordinary(twin, length))
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="effopt", options={"plans": plan})
    assert generate(model, effopt.cache_for(model, plan, max_cache_len=length)) == expected


def held_bytes(cache: Any) -> int:
    """Bytes of the storages of everything that a cache keeps."""
    tensors = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, Tensor)]
    tensors = [t for t in tensors if t.is_floating_point()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def expected_bytes(plan: effopt.Plan, full: Any) -> int:
    """Of `sink + recent` keys and values a streaming head, and all of the others."""
    total = 0
    for layer, decision in zip(full.layers, decisions(plan).values(), strict=True):
        b, heads, s, d = layer.keys.shape
        streaming = len(decision["streaming"]) if decision else 0
        total += 2 * 4 * b * d * ((heads - streaming) * s + streaming * (SINK + RECENT))
    assert total < kv_bytes(full)
    return total


@pytest.mark.parametrize("length", [None, 40], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    "chunks", sampled([(1,) * 9, (2, 9, 1), (2, 1, 9, 1, 7, 3), (3, 3, 3)], (2, 9, 1)), ids=str
)
def test_tokens_that_come_in_pieces(chunks: tuple[int, ...], length: int | None) -> None:
    """Sinks that fill up late, a ring that is overrun by one piece, and pieces longer than it."""
    model, plan, twin = case("llama")
    cache, full = effopt.cache_for(model, plan, max_cache_len=length), ordinary(twin, length)
    torch.manual_seed(4)
    ids = torch.randint(3, 100, (2, sum(chunks)))
    seen = torch.ones_like(ids)
    seen[0, :2] = 0
    torch._dynamo.reset()
    run = compiled(model.forward, plans=plan)
    done = 0
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=32):
        for count in chunks:
            piece = slice(done, done + count)
            done += count
            got, want = (
                f(
                    input_ids=ids[:, piece],
                    attention_mask=seen[:, :done],
                    past_key_values=held,
                    use_cache=True,
                ).logits
                for f, held in ((run, cache), (twin, full))
            )
            real = seen[:, piece].bool()
            assert relative(got[real], want[real]) < 1e-5, f"at {piece}"


@pytest.mark.slow
def test_beams_take_their_caches_along() -> None:
    model, plan, twin = case("llama")
    expected = generate(twin, ordinary(twin, None), 3)
    torch._dynamo.reset()
    model.forward = compiled(model.forward, plans=plan)
    assert generate(model, effopt.cache_for(model, plan), 3) == expected


def test_all_heads_that_see_all_are_the_same_graph() -> None:
    model = small("llama")
    plan = effopt.calibrate(model, [batch()], f"{NAME}{{retrieval=1.0,sink=2,recent=5}}")
    assert not any(decisions(plan).values())
    looks = [Look(), Look()]
    outputs = []
    for look, options in zip(looks, ({}, {"plans": plan}), strict=True):
        torch._dynamo.reset()
        with torch.no_grad():
            outputs.append(compiled(model, look, **options)(**batch()).logits)
    assert torch.equal(*outputs)
    assert [str(m.graph) for m in looks[0].seen] == [str(m.graph) for m in looks[1].seen]
    assert {type(layer).__name__ for layer in effopt.cache_for(model, plan).layers} == {"DynamicLayer"}


def test_score_is_the_error_of_a_streaming_head() -> None:
    model: Any = small("llama").double()
    captured: list[tuple[Any, ...]] = []
    attend = torch.nn.functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(
            torch.nn.functional,
            "scaled_dot_product_attention",
            lambda *a, **k: captured.append(a) or attend(*a, **k),
        )
        model(**batch())
    plan = effopt.calibrate(model, [batch()], f"{NAME}{{sink=2,recent=5}}")
    causal = torch.ones(20, 20, dtype=torch.bool).tril()[None, None]
    for (q, k, v, *_), entry in zip(captured, plan.sections[0].entries, strict=True):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        full, alone = (attend(q, k, v, seen) for seen in (causal, seen_by(causal, 2, 5)))
        error, size = (x.square().reshape(2, 2, -1).sum(-1) for x in (full - alone, full))
        assert entry.score == pytest.approx((error / size).mean(0).tolist(), rel=1e-5)
    assert effopt.Plan.from_json(plan.to_json()) == plan
    assert str(plan).count("score ") == 2
    errors = sorted(s for e in plan.sections[0].entries for s in e.score)  # type: ignore[union-attr]
    streaming = [
        e.score[h]  # type: ignore[index]
        for e in plan.sections[0].entries
        for h in (e.decision or {}).get("streaming", ())
    ]
    assert sorted(streaming) == errors[:2]


@pytest.mark.slow
def test_gradients_equal_the_twin() -> None:
    model, plan, twin = case("llama")
    inputs = batch()
    run = compiled(model, plans=plan)
    for f in (run, twin):
        f(**inputs).logits.square().mean().backward()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert relative(mine.grad, theirs.grad) < 1e-4  # type: ignore[arg-type]


def test_choices_for_tuning() -> None:
    """All heads of a layer, or all but one."""
    found: list[Any] = []

    class Asked(SplitHeadsByRole):
        def apply(self, module: Any, context: Any) -> Any:
            found.append(self.choices(module, context, PassResult()))
            return PassResult()

    with torch.no_grad():
        compiled(small("llama"), passes=Asked(sink=2, recent=5))(**batch())
    assert [d["streaming"] for d in found[0]["model.layers.1"]] == [[0, 1], [1], [0]]


@pytest.mark.slow
def test_composes_with_dropped_layers() -> None:
    model = model_of("llama")
    plan = effopt.calibrate(model, [batch()], f"drop-layers{{keep=0.5}},{NAME}{{sink=2,recent=5}}")
    cache = effopt.cache_for(model, plan)
    full = DynamicCache(config=model.config)
    torch._dynamo.reset()
    run = compiled(copy.deepcopy(model).forward, plans=plan)
    with torch.no_grad():
        for piece in (prompt()[0], prompt()[0][:, :1]):
            got = [run(input_ids=piece, past_key_values=c).logits for c in (cache, full)]
            assert relative(*got) < 1e-5
