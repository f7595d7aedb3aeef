"""Sharing keys and values equals the eager twin: values, gradients, tokens; what goes, and what is left."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F
from transformers import StaticCache

import effopt
from effopt.errors import PlanError
from effopt.graph.printing import listing
from effopt.graph.rewrite import PassResult
from effopt.passes.base import Context, GraphPass, Stage
from effopt.passes.kv.share_kv_across_layers import ShareKVAcrossLayers
from tests.models import architectures
from tests.models.architectures import sampled, sampled_rows
from tests.models.eager_twin import relative, twin_of
from tests.models.plain import Plain
from tests.test_caches import generate, kv_bytes, model_of, ordinary, prompt

NAME = "share-kv-across-layers"
MODELS = ("llama", "qwen3", "gpt2", "bert", "t5", "mixtral", "vit", "plain")


@dataclass(frozen=True)
class Look(GraphPass):
    """Hands each graph to `seen` at the end of the pipeline."""

    name: ClassVar[str] = "look"
    stage: ClassVar[Stage] = Stage.FINISH
    seen: list[GraphModule] = field(default_factory=list)

    def apply(self, module: GraphModule, context: Context) -> PassResult:
        module.graph.eliminate_dead_code()
        self.seen.append(copy.copy(module))
        return PassResult()

    def count(self, target: str) -> list[int]:
        """Calls of an op whose name holds `target`, in each graph."""
        return [sum(target in str(n.target) for n in m.graph.nodes) for m in self.seen]


def compiled(function: Any, look: Look | None = None, **options: Any) -> Callable[..., Any]:
    passes = [options.pop("passes", ""), *([look] if look else [])]
    chosen = {"lowering": "eager", **options, "passes": [p for p in passes if p]}
    return torch.compile(function, backend="effopt", options=chosen)


def model_and_inputs(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Four layers without a cache, in float64 where the model allows."""
    torch.manual_seed(1)
    if name == "plain":
        return Plain(4).double(), {"input_ids": torch.randint(3, 100, (2, 9))}
    if name == "vit":
        config: Any = transformers.ViTConfig(
            hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=112, image_size=16,
            patch_size=8,
        )  # fmt: skip
        return transformers.ViTModel(config).double().eval(), {
            "pixel_values": torch.randn(2, 3, 16, 16).double()
        }
    ids, mask = prompt()
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name == "bert":
        return architectures.build(name, num_hidden_layers=4)[0].double(), inputs
    model = model_of(name)
    model.config.use_cache = False
    if name == "t5":
        model.decoder.config.use_cache = False
        inputs |= {"decoder_input_ids": ids[:, 4:]}
    return (model if name == "mixtral" else model.double()), inputs


def output_of(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else architectures.main_output(result)


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


def planned(model: Any, spec: str = NAME) -> effopt.Plan:
    ids, mask = prompt()
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids
    return effopt.calibrate(model, [batch], spec)


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


class Writing(nn.Module):
    """Layers that write their keys in place and also return them, as no caller could keep apart."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))

    def forward(self, x: Tensor, *held: Tensor) -> tuple[Tensor, ...]:
        kept: list[Tensor] = []
        for step, cache in zip(self.steps, held, strict=True):
            q, k, v = (t.transpose(1, 2) for t in step(x).unflatten(-1, (-1, 4)).chunk(3, -2))
            cache.copy_(k)
            x = x + F.scaled_dot_product_attention(q, cache, v).transpose(1, 2).flatten(2)
            kept.append(cache[:, :1])
        return (x, *kept)


def reasons(model: Any, *inputs: Any, passes: str = NAME, **named: Any) -> list[str]:
    with effopt.record() as report, torch.no_grad():
        compiled(model, passes=passes)(*inputs, **named)
    assert NAME not in report.counts
    return [r.reason for r in report.rejected if r.pass_name == NAME]


def test_views_of_a_written_cache_are_refused() -> None:
    held = [torch.zeros(2, 4, 5, 4) for _ in range(2)]
    (reason,) = reasons(Writing(), torch.randn(2, 5, 16), *held)
    assert "it returns a cache that it also writes in place" in reason


def test_sliding_and_full_attention_share_nothing() -> None:
    model, inputs = architectures.build("gemma2", num_hidden_layers=4)
    found = reasons(model, **inputs)
    assert len(found) == 2
    assert all("its bias is not that of model.layers." in reason for reason in found)


def test_model_without_attention_has_a_reason() -> None:
    layers = nn.Sequential(*(Gated() for _ in range(2)))
    (reason,) = reasons(layers, torch.randn(2, 5, 16))
    assert reason == "0, 1 share nothing: 1 holds no attention that was recognised"


class Gated(nn.Module):
    """A layer without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


def test_unknown_layers_have_a_reason() -> None:
    model, inputs = model_and_inputs("llama")
    (reason,) = reasons(model, passes=f"{NAME}{{include=model.layer.*}}", **inputs)
    assert reason == "include=model.layer.* is none of model.layers.0 to model.layers.3"


def test_include_makes_groups_of_neighbours() -> None:
    model, inputs = model_and_inputs("llama")
    chosen = ShareKVAcrossLayers(group=3, include="model.layers.[123]")
    with effopt.record() as report, torch.no_grad():
        compiled(model, passes=chosen)(**inputs)
    (section,) = report.graphs[0].planned
    assert [entry.decision for entry in section.stacks[0].layers] == [None, None, 1, 1]


def test_plan_of_another_model_is_an_error() -> None:
    model, inputs = model_and_inputs("llama")
    other, _ = architectures.build("llama", num_hidden_layers=3)
    plan = planned(other)
    with torch.no_grad(), pytest.raises(Exception, match="it has 4 layers, the plan 3") as raised:
        compiled(model, plans=plan)(**inputs)
    assert isinstance(raised.value, PlanError) or "PlanError" in str(raised.value)


def test_plan_that_a_graph_does_not_allow_is_an_error() -> None:
    gemma, inputs = architectures.build("gemma2", num_hidden_layers=4)
    text = effopt.calibrate(gemma, [inputs], NAME).to_json()
    first, second = text.split('"decision": null', 1)[0], text.split('"decision": null', 1)[1]
    plan = effopt.Plan.from_json(
        first + '"decision": null' + second.replace('"decision": null', '"decision": 0', 1)
    )
    with (
        torch.no_grad(),
        pytest.raises(Exception, match="cannot be carried out in this graph: its bias is not"),
    ):
        compiled(gemma, plans=plan)(**inputs)
