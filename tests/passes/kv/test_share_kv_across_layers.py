"""Sharing keys and values equals the eager twin: values, gradients, tokens; and what goes."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import StaticCache

import effopt
from effopt.graph.printing import listing
from tests.models.architectures import sampled, sampled_rows
from tests.models.eager_twin import relative, twin_of
from tests.models.plain import Plain
from tests.passes.kv.models import NAME, Look, compiled, model_and_inputs, output_of, planned
from tests.test_caches import generate, kv_bytes, model_of, ordinary, prompt

MODELS = ("llama", "qwen3", "gpt2", "bert", "t5", "mixtral", "vit", "plain")


def twin(model: nn.Module, group: int) -> nn.Module:
    if not isinstance(model, Plain):
        return twin_of(model, share=group)
    copied = copy.deepcopy(model)
    copied.group = group
    return copied


ROWS = [*((name, 2) for name in MODELS), ("llama", 3), ("t5", 3), ("plain", 3)]
FAST = {("llama", 2), ("gpt2", 2), ("mixtral", 2), ("t5", 3), ("plain", 3)}


@pytest.mark.parametrize(("name", "group"), sampled_rows(ROWS, lambda *row: row in FAST))
def test_values_and_gradients_are_the_twin_s(name: str, group: int) -> None:
    model, inputs = model_and_inputs(name)
    oracle = twin(model, group)
    wanted = output_of(oracle(**inputs))
    with effopt.record() as report:
        got = output_of(compiled(model, passes=f"{NAME}{{group={group}}}")(**inputs))
    # Mixtral's grouped matmul has no float64; norms of most others are float32, whatever the weights are.
    limit, gradient_limit = (1e-5, 1e-4) if name == "mixtral" else (1e-10, 1e-6)
    assert relative(got.detach(), wanted.detach()) < limit
    assert relative(got.detach(), output_of(model(**inputs)).detach()) > 1e-3
    assert report.graphs[0].training
    assert not report.faults
    weights = torch.randn_like(wanted)
    (got * weights).sum().backward()
    (wanted * weights).sum().backward()
    grads = {n.replace(".own.", "."): p.grad for n, p in oracle.named_parameters()}
    for path, parameter in model.named_parameters():
        expected = grads.get(path)
        if (
            expected is None or parameter.grad is None
        ):  # a projection that nothing reads, in one form or the other
            assert expected is None or not expected.any()
            assert parameter.grad is None or not parameter.grad.any()
        else:
            assert (parameter.grad - expected).abs().max() <= gradient_limit * expected.abs().max() + 1e-12


@pytest.mark.parametrize("name", sampled(["llama", "t5", "plain"], "llama"))
def test_group_of_one_is_the_same_graph(name: str) -> None:
    model, inputs = model_and_inputs(name)
    texts = []
    for passes in ("", f"{NAME}{{group=1}}"):
        torch._dynamo.reset()
        look = Look()
        with torch.no_grad():
            compiled(model, look, passes=passes)(**inputs)
        texts.append([listing(module) for module in look.seen])
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("name", "projections"),
    sampled_rows(
        [("llama", 2), ("bert", 2), ("t5", 4), ("plain", 2)], lambda name, _: name in ("t5", "plain")
    ),
)
def test_projections_of_later_layers_are_gone(name: str, projections: int) -> None:
    model, inputs = model_and_inputs(name)
    counts = []
    for passes in ("", NAME):
        torch._dynamo.reset()
        look = Look()
        with torch.no_grad():
            compiled(model, look, passes=passes)(**inputs)
        counts.append(sum(look.count("linear.default")))
    later = 2 * projections + (2 if name == "t5" else 0)  # t5: two encoder layers, one of them later
    assert counts[0] - counts[1] == later


CACHES = itertools.product(["llama", "gpt2", "mixtral"], [None, 40], ["transformers", "cache_for"])


@pytest.mark.parametrize(
    ("name", "length", "made_by"),
    sampled_rows(CACHES, lambda name, length, by: name == "llama" and (by == "cache_for" or length is None)),
)
def test_generate(name: str, length: int | None, made_by: str) -> None:
    model: Any = model_of(name)
    oracle: Any = twin_of(model, share=2)
    beams = 3 if name == "gpt2" else 1
    expected = generate(oracle, ordinary(oracle, length), beams)
    plan = planned(model)
    cache = ordinary(model, length)
    if made_by == "cache_for":
        cache = effopt.cache_for(model, plan, max_cache_len=length)
    torch._dynamo.reset()
    model.forward = compiled(model.forward, plans=plan)
    with effopt.record() as report:
        assert generate(model, cache, beams) == expected
    assert not report.faults
    assert not [g.refused for g in report.graphs if g.refused]
    full = ordinary(oracle, length)
    generate(oracle, full, beams)
    assert kv_bytes(cache) * (2 if made_by == "cache_for" else 1) == kv_bytes(full)


@pytest.mark.slow
@pytest.mark.parametrize("length", [None, 40], ids=["dynamic", "static"])
def test_generate_through_inductor(length: int | None) -> None:
    model: Any = model_of("llama")
    oracle: Any = twin_of(model, share=2)
    expected = generate(oracle, ordinary(oracle, length))
    plan = planned(model)
    model.forward = torch.compile(model.forward, backend="effopt", options={"plans": plan})
    assert generate(model, effopt.cache_for(model, plan, max_cache_len=length)) == expected


def test_static_caches_of_later_layers_are_not_written() -> None:
    model: Any = model_of("llama")
    cache = StaticCache(model.config, 16)
    cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    look = Look()
    step = compiled(model.forward, look, passes=NAME)
    with torch.no_grad():
        step(input_ids=prompt()[0], past_key_values=cache, use_cache=True)
    written = [bool(layer.keys.any() or layer.values.any()) for layer in cache.layers]
    assert written == [True, False, True, False]
    assert look.count("index_copy") == [4]
    assert [int(layer.cumulative_length) for layer in cache.layers] == [12] * 4


def test_one_plan_serves_calls_with_and_without_a_cache() -> None:
    model: Any = model_of("llama")
    oracle: Any = twin_of(model, share=2)
    ids, _ = prompt()
    plan = planned(model)
    expected = generate(oracle, ordinary(oracle, None))
    run = compiled(model.forward, plans=effopt.Plan.from_json(plan.to_json()))
    with torch.no_grad():
        assert relative(run(ids, use_cache=False).logits, oracle(ids, use_cache=False).logits) < 1e-5
    model.forward = run
    assert generate(model, effopt.cache_for(model, plan)) == expected
    out = run(ids, use_cache=False).logits
    assert out.requires_grad
    assert relative(out.detach(), oracle(ids, use_cache=False).logits.detach()) < 1e-5


class Kept(nn.Module):
    """Layers with a cache of their own making: `[b, s, h, d]`, returned whole and as its last `window`."""

    def __init__(self, window: int = 3) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.window, self.is_shared = window, False

    def forward(self, x: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        kept: list[Tensor] = []
        for i, step in enumerate(self.steps):
            q, k, v = step(x).unflatten(-1, (-1, 4)).chunk(3, -2)
            k, v = torch.cat([past[2 * i], k], 1), torch.cat([past[2 * i + 1], v], 1)
            if i and self.is_shared:
                k, v = kept[:2]
            y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
            x = x + y.transpose(1, 2).flatten(2)
            kept += [k, v, k[:, -self.window :] * 2]
        return (x, *kept)


def test_returned_caches_of_any_layout_are_those_of_the_first_layer() -> None:
    torch.manual_seed(0)
    model, look = Kept(), Look()
    inputs = torch.randn(2, 1, 16), *(torch.randn(2, 4, 4, 4) for _ in range(4))
    with torch.no_grad():
        got = compiled(model, look, passes=NAME)(*inputs)
        model.is_shared = True
        expected = model(*inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    # The caller may write into one of them: no two are one tensor.
    assert len({t.untyped_storage().data_ptr() for t in got}) == 7
    assert look.count("cat.default") == [2]
