"""Layers are the modules of a model where it has them, are found without, and look-alikes are none."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional as F

from effopt import pipeline as pipelines
from effopt.graph.analyses.layers import Stacks, attention_of, stacks
from effopt.graph.capture import capture
from effopt.graph.restore import restore
from effopt.passes.base import Stage
from effopt.plugins.manager import build_registry
from effopt.testing.trial import Trial, run_passes
from tests.models.architectures import ARCHITECTURES, MORE, build
from tests.models.plain import Plain


@dataclass
class Seen:
    """What was found in one graph, and what its layers read and gave when it was run."""

    found: Stacks
    values: dict[Node, Tensor] = field(default_factory=dict)

    @property
    def paths(self) -> list[list[str]]:
        return [[layer.path for layer in stack.layers] for stack in self.found]


class Watch(Interpreter):
    """Runs a graph and keeps the values at the borders of layers."""

    def __init__(self, module: GraphModule, seen: Seen) -> None:
        super().__init__(module)
        self.seen = seen
        self.borders = {n for s in seen.found for layer in s.layers for n in (layer.entry, layer.exit)}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self.borders:
            self.seen.values[n] = value.detach().clone()
        return value


def recorder(graphs: list[Seen], runs: bool) -> Callable[..., Any]:
    """A backend that gathers the layers of every graph, and runs it once for their values if it `runs`."""
    passes = [p for p in pipelines.build(build_registry()) if p.stage < Stage.LAYERS]

    def backend(module: GraphModule, example: Any) -> Callable[..., Any]:
        trial = Trial(capture(module, example), tuple(example))
        run_passes(trial, passes)
        graphs.append(Seen(stacks(trial.module.graph)))
        if runs:
            runnable = restore(trial.captured, runs_eagerly=True)
            Watch(runnable, graphs[-1]).run(*map(real, example))
        return module.forward

    return backend


def real(value: Any) -> Any:
    """An input for a run of its own."""
    if isinstance(value, torch.SymInt):
        return int(value)
    return value.clone() if isinstance(value, Tensor) else value


def analysed(model: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any) -> list[Seen]:
    """The graphs of a call, canonicalized and cleaned up, each with its layers."""
    graphs: list[Seen] = []
    torch.compile(model, backend=recorder(graphs, True), dynamic=dynamic)(*args, **kwargs)
    return graphs


def only(graphs: list[Seen]) -> Seen:
    """The graph, of several, that has layers; checks what the analysis promises of it."""
    (seen,) = [g for g in graphs if g.found.found]
    for stack in seen.found:
        assert len(stack.layers) > 1
        for before, after in zip(stack.layers, stack.layers[1:], strict=False):
            assert before.exit is after.entry
        for layer in stack.layers:
            entry, exit_ = layer.entry.meta["val"], layer.exit.meta["val"]
            assert (entry.dtype, entry.device) == (exit_.dtype, exit_.device)
            assert list(map(str, entry.shape)) == list(map(str, exit_.shape))
            assert layer.exit in layer.nodes
            assert list(layer.nodes) == sorted(layer.nodes)
    return seen


def watch_modules(model: nn.Module, paths: list[str]) -> tuple[dict[str, list[Tensor]], Callable[[], None]]:
    """What the modules read and give from now on, and how to stop."""
    noted: dict[str, list[Tensor]] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            read = args[0] if args else kwargs["hidden_states"]
            given = output[0] if isinstance(output, tuple) else output
            noted[path] = [read.detach().clone(), given.detach().clone()]

        return hook

    hooks = [model.get_submodule(p).register_forward_hook(note(p), with_kwargs=True) for p in paths]
    return noted, lambda: [h.remove() for h in hooks].clear()


def agrees_with_modules(
    model: nn.Module, inputs: dict[str, Any], expected: list[list[str]], **how: Any
) -> Seen:
    """Its stacks are these modules, and their borders carry what the modules read and give in eager."""
    noted, stop = watch_modules(model, [path for stack in expected for path in stack])
    model(**inputs)
    stop()
    seen = only(analysed(model, **inputs, **how))
    assert seen.paths == expected
    for layer in (layer for stack in seen.found for layer in stack.layers):
        read, given = noted[layer.path]
        # Some read [tokens, batch, features] and the graph no copy of that.
        torch.testing.assert_close(seen.values[layer.entry], read, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen.values[layer.exit], given, rtol=1e-4, atol=1e-5)
    return seen


CONTAINERS = {
    "gpt2": "transformer.h",
    "bert": "encoder.layer",
    "t5-encoder": "encoder.block",
    "opt": "model.decoder.layers",
    "bloom": "transformer.h",
    "falcon": "transformer.h",
    "gpt-neox": "gpt_neox.layers",
}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Bloom does
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(name: str, training: bool) -> None:
    model, inputs = build(
        name, num_hidden_layers=3, **({"n_layer": 3} if "h" in CONTAINERS.get(name, "") else {})
    )
    container = CONTAINERS.get(name, "model.layers")
    count = len(model.get_submodule(container))
    with torch.set_grad_enabled(training):
        seen = agrees_with_modules(model, inputs, [[f"{container}.{i}" for i in range(count)]])
    assert [len(attention_of(layer)) for layer in seen.found.found[0].layers] == [1] * count
    assert not seen.found.refused
    if name != "t5-encoder":  # its entry is the embedding itself, its config calls the depth otherwise
        assert count == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_architectures(name: str) -> None:
    model, inputs = build(name)
    with torch.no_grad():
        seen = only(analysed(model, **inputs))
    assert [len(stack) for stack in seen.paths] == [2]
    if name != "albert":  # one module, called twice
        assert all(path.endswith(f".{i}") or path == f"layers.{i}" for i, path in enumerate(seen.paths[0]))


def seq2seq(name: str) -> tuple[nn.Module, dict[str, Tensor], list[list[str]]]:
    torch.manual_seed(0)
    ids = {"input_ids": torch.randint(3, 100, (2, 12)), "decoder_input_ids": torch.randint(3, 100, (2, 7))}
    if name == "t5":
        config: Any = transformers.T5Config(
            vocab_size=100, d_model=64, d_kv=16, d_ff=112, num_layers=3, num_decoder_layers=2, num_heads=4,
            dropout_rate=0.0, use_cache=False, decoder_start_token_id=0,
        )  # fmt: skip
        model: nn.Module = transformers.T5ForConditionalGeneration(config)
        return (
            model,
            ids,
            [[f"encoder.block.{i}" for i in range(3)], [f"decoder.block.{i}" for i in range(2)]],
        )
    config = transformers.BartConfig(
        vocab_size=100, d_model=64, encoder_layers=3, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=112, decoder_ffn_dim=112, max_position_embeddings=64,
        dropout=0.0, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    paths = [[f"model.{part}.layers.{i}" for i in range(n)] for part, n in (("encoder", 3), ("decoder", 2))]
    return transformers.BartForConditionalGeneration(config), ids, paths


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_and_decoder_are_two_stacks(name: str) -> None:
    model, inputs, paths = seq2seq(name)
    with torch.no_grad():
        seen = agrees_with_modules(model.eval(), inputs, paths)
    encoder, decoder = seen.found
    assert [len(attention_of(layer)) for layer in encoder.layers] == [1, 1, 1]
    assert [len(attention_of(layer)) for layer in decoder.layers] == [2, 2]


def test_images() -> None:
    shape = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 112}
    model = transformers.ViTModel(transformers.ViTConfig(**shape, image_size=16, patch_size=8)).eval()
    with torch.no_grad():
        agrees_with_modules(
            model, {"pixel_values": torch.randn(2, 3, 16, 16)}, [[f"layers.{i}" for i in range(3)]]
        )


def test_stages_of_differing_width_are_a_stack_each() -> None:
    config = transformers.ConvNextConfig(
        hidden_sizes=[16, 32], depths=[2, 3], image_size=32, num_stages=2, patch_size=2
    )
    model = transformers.ConvNextModel(config).eval()
    paths = [[f"encoder.stages.{s}.layers.{i}" for i in range(n)] for s, n in ((0, 2), (1, 3))]
    with torch.no_grad():
        agrees_with_modules(model, {"pixel_values": torch.randn(2, 3, 32, 32)}, paths)


def test_a_block_that_projects_its_input_is_no_layer() -> None:
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[2, 3], layer_type="basic"
    )
    model = transformers.ResNetModel(config).eval()
    with torch.no_grad():
        seen = only(analysed(model, pixel_values=torch.randn(1, 3, 32, 32)))
    assert [p.rpartition("stages.")[2] for stack in seen.paths for p in stack] == [
        "0.layers.0", "0.layers.1", "1.layers.1", "1.layers.2",
    ]  # fmt: skip
    ((_, reason),) = seen.found.refused
    assert "stages.1.layers.0 does not carry on what it reads" in reason


def test_dynamic_sizes() -> None:
    model, inputs = build("llama", num_hidden_layers=3)
    with torch.no_grad():
        agrees_with_modules(model, inputs, [[f"model.layers.{i}" for i in range(3)]], dynamic=True)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_prefill_and_decode_have_the_same_layers(name: str, cache: str) -> None:
    model, inputs = build(name, use_cache=True)
    graphs: list[Seen] = []
    model.forward = torch.compile(model.forward, backend=recorder(graphs, False))
    extra = {"cache_implementation": "static"} if cache == "static" else {}
    model.generate(
        inputs["input_ids"],
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        disable_compile=True,
        **extra,
    )
    seen = [g for g in graphs if g.found.found]
    assert len(seen) >= 2
    container = CONTAINERS.get(name, "model.layers")
    for graph in seen:
        only([graph])
        assert graph.paths == [[f"{container}.0", f"{container}.1"]]
        assert [len(attention_of(layer)) for layer in graph.found.found[0].layers] == [1, 1]


WIDTH = 16


def weights(count: int, *shapes: tuple[int, ...]) -> list[list[Tensor]]:
    torch.manual_seed(0)
    return [[torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes] for _ in range(count)]


def attend(x: Tensor, qkv: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = F.linear(x, qkv).chunk(3, -1)
    scores = q @ k.transpose(-1, -2) * 0.25
    return (scores if mask is None else scores.masked_fill(~mask, -1e9)).softmax(-1) @ v


BLOCK = ((3 * WIDTH, WIDTH), (32, WIDTH), (WIDTH, 32))


def pre_norm(x: Tensor, layers: list[list[Tensor]]) -> Tensor:
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    for qkv, up, down in layers:
        x = x + attend(F.layer_norm(x, (WIDTH,)), qkv, mask)
        x = x + F.linear(F.relu(F.linear(F.layer_norm(x, (WIDTH,)), up)), down)
    return F.layer_norm(x, (WIDTH,))


def post_norm(x: Tensor, layers: list[list[Tensor]]) -> Tensor:
    x = F.layer_norm(x, (WIDTH,))
    for qkv, up, down in layers:
        x = F.layer_norm(x + attend(x, qkv), (WIDTH,))
        x = F.layer_norm(F.linear(F.relu(F.linear(x, up)), down) + x, (WIDTH,))
    return x.mean(1)


def parallel(x: Tensor, layers: list[list[Tensor]]) -> Tensor:
    for qkv, up, down in layers:
        h = F.layer_norm(x, (WIDTH,))
        x = attend(h, qkv) + F.linear(F.gelu(F.linear(h, up)), down) + x
    return x


def with_positions(x: Tensor, layers: list[list[Tensor]]) -> Tensor:
    """Each layer adds the same positions to what it attends to, and the stream starts with them too."""
    positions = torch.arange(x.shape[1] * WIDTH, dtype=x.dtype).view(x.shape[1], WIDTH).expand_as(x).cos()
    x = x + positions
    for qkv, up, down in layers:
        x = x + attend(F.layer_norm(x + positions, (WIDTH,)), qkv)
        x = x + F.linear(F.relu(F.linear(F.layer_norm(x, (WIDTH,)), up)), down)
    return x


@pytest.mark.parametrize("model", [pre_norm, post_norm, parallel, with_positions])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_models_without_modules(model: Callable[..., Tensor], training: bool) -> None:
    count = 4
    x, layers = torch.randn(2, 5, WIDTH, requires_grad=training), weights(count, *BLOCK)
    with torch.set_grad_enabled(training):
        seen = only(analysed(model, x, layers))
        (stack,) = seen.found
        assert seen.paths == [[f"layer {i}" for i in range(count)]]
        assert [len(attention_of(layer)) for layer in stack.layers] == [1] * count
        # A model of the first k layers gives what the k-th one gives.
        last = seen.values[stack.layers[-1].exit]
        end = (
            F.layer_norm(last, (WIDTH,))
            if model is pre_norm
            else last.mean(1)
            if model is post_norm
            else last
        )
        torch.testing.assert_close(end, model(x, layers), rtol=1e-4, atol=1e-5)
        for k, layer in enumerate(stack.layers[1:], 1):
            entered = seen.values[layer.entry]
            end = (
                F.layer_norm(entered, (WIDTH,)) if model is pre_norm
                else entered.mean(1) if model is post_norm else entered
            )  # fmt: skip
            torch.testing.assert_close(end, model(x, layers[:k]), rtol=1e-4, atol=1e-5)


def test_parameters_in_a_dictionary_and_stacked_in_one_tensor() -> None:
    def dictionary(x: Tensor, p: dict[str, Tensor]) -> Tensor:
        return pre_norm(x, [[p[f"{name}{i}"] for name in "abc"] for i in range(3)])

    def stacked(x: Tensor, qkv: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return pre_norm(x, [[qkv[i], up[i], down[i]] for i in range(3)])

    layers = weights(3, *BLOCK)
    x = torch.randn(2, 5, WIDTH)
    named = {f"{name}{i}": w for i, layer in enumerate(layers) for name, w in zip("abc", layer, strict=True)}
    with torch.no_grad():
        assert only(analysed(dictionary, x, named)).paths == [["layer 0", "layer 1", "layer 2"]]
        joined = [torch.stack(column) for column in zip(*layers, strict=True)]
        assert only(analysed(stacked, x, *joined)).paths == [["layer 0", "layer 1", "layer 2"]]


def test_a_flat_module() -> None:
    with torch.no_grad():
        seen = only(analysed(Plain(5), input_ids=torch.randint(0, 100, (2, 7))))
    assert seen.paths == [[f"layer {i}" for i in range(5)]]


def test_two_flat_stacks_are_counted() -> None:
    def model(x: Tensor, memory: Tensor, encoder: list[list[Tensor]], decoder: list[list[Tensor]]) -> Tensor:
        memory = pre_norm(memory, encoder)
        for q, kv, up, down in decoder:
            k, v = F.linear(memory, kv).chunk(2, -1)
            y = (F.linear(F.layer_norm(x, (WIDTH,)), q) @ k.transpose(-1, -2)).softmax(-1) @ v
            x = x + y
            x = x + F.linear(F.relu(F.linear(F.layer_norm(x, (WIDTH,)), up)), down)
        return x

    encoder = weights(2, *BLOCK)
    decoder = weights(3, (WIDTH, WIDTH), (2 * WIDTH, WIDTH), *BLOCK[1:])
    with torch.no_grad():
        seen = only(analysed(model, torch.randn(2, 4, WIDTH), torch.randn(2, 5, WIDTH), encoder, decoder))
    assert seen.paths == [[f"stack {s} layer {i}" for i in range(n)] for s, n in ((0, 2), (1, 3))]


def test_results_of_layers_may_be_outputs() -> None:
    def model(x: Tensor, layers: list[list[Tensor]]) -> tuple[Tensor, list[Tensor]]:
        given = []
        for layer in layers:
            x = parallel(x, [layer])
            given += [x, F.layer_norm(x, (WIDTH,))]
        return x, given

    with torch.no_grad():
        seen = only(analysed(model, torch.randn(2, 5, WIDTH), weights(3, *BLOCK)))
    assert seen.paths == [["layer 0", "layer 1", "layer 2"]]


class Block(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Attention(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.down(self.up(h).softmax(-1))


class Model(nn.Module):
    """`blocks`, run by `how`."""

    def __init__(self, how: Callable[[nn.ModuleList, Tensor], Any], *blocks: nn.Module) -> None:
        super().__init__()
        self.how, self.blocks = how, nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Any:
        return self.how(self.blocks, x)


def unet(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    a = blocks[0](x)
    b = blocks[1](a)
    c = blocks[2](b)
    return blocks[3](c + b) + a


def ladder(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    given = []
    for block in blocks:
        x = block(x)
        given.append(x)
    return torch.cat(given, -1)


def dense(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = torch.cat([x, block(x[..., :WIDTH])], -1)
    return x


def towers(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    return sum(block(x) for block in blocks)


def delayed(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    """Each block's addition reaches the stream one block later: two values are passed on."""
    pending = torch.zeros_like(x)
    for block in blocks:
        y = block(x) - x
        x, pending = x + pending, y.tanh()
    return x + pending


def gated(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        gate = torch.sigmoid(block.down(block.up(x)))
        x = gate * block.norm(x) + (1 - gate) * x
    return x


def without_residual(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block.down(block.up(x).relu())
    return x


def four() -> list[Block]:
    torch.manual_seed(0)
    return [Block() for _ in range(4)]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Model(unet, *four()), "what blocks.1 gives is read by blocks.2 and add"),
        (Model(ladder, *four()), "what blocks.0 gives is read again behind the last layer"),
        (Model(dense, *four()), ""),
        (Model(towers, *four()), ""),
        (Model(towers, *four()[:2]), ""),
        (Model(delayed, *four()), ""),
        (Model(gated, *four()), ""),
        (Model(without_residual, *four()), ""),
        (nn.Sequential(Block(16), nn.Linear(16, 32), Block(32), nn.Linear(32, 8), Block(8)), ""),
        (nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), ""),
    ],
    ids=[
        "unet",
        "ladder",
        "dense",
        "towers",
        "two towers",
        "delayed",
        "gated",
        "no residual",
        "widths",
        "two linears",
    ],
)
def test_look_alikes_are_no_stack(model: nn.Module, reason: str) -> None:
    with torch.no_grad():
        (seen,) = analysed(model, torch.randn(2, 5, WIDTH))
    assert seen.paths == []
    if reason:
        assert any(reason in told for _, told in seen.found.refused), seen.found.refused


class Layered(nn.Module):
    """One layer whose parts are in a list, as T5 has them."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Attention(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[1](self.parts[0](x))


def test_parts_of_a_layer_are_not_layers() -> None:
    x = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        (alone,) = analysed(nn.Sequential(Layered()), x)
        assert alone.paths == []
        assert only(analysed(nn.Sequential(*(Layered() for _ in range(3))), x)).paths == [["0", "1", "2"]]


def test_layers_apart_are_two_stacks() -> None:
    """What lies between is no layer, so what one gives is not what the next one reads."""

    def how(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        return blocks[3](blocks[2](torch.tanh(blocks[1](blocks[0](x)))))

    with torch.no_grad():
        seen = only(analysed(Model(how, *four()), torch.randn(2, 5, WIDTH)))
    assert seen.paths == [["blocks.0", "blocks.1"], ["blocks.2", "blocks.3"]]


def test_a_shared_module_is_as_many_layers_as_calls() -> None:
    def how(blocks: nn.ModuleList, x: Tensor) -> Tensor:
        for _ in range(3):
            x = blocks[0](x)
        return x

    with torch.no_grad():
        seen = only(analysed(Model(how, Block()), torch.randn(2, 5, WIDTH)))
    assert seen.paths == [["layer 0", "layer 1", "layer 2"]]


def test_ten_thousand_nodes_take_less_than_a_second() -> None:
    x, layers = torch.randn(2, 5, WIDTH), weights(450, *BLOCK)
    held: list[GraphModule] = []

    def backend(module: GraphModule, example: Any) -> Callable[..., Any]:
        held.append(capture(module, example).module)
        return module.forward

    with torch.no_grad():
        torch.compile(pre_norm, backend=backend)(x, layers)
    assert len(held[0].graph.nodes) > 9000
    start = time.process_time()
    (stack,) = stacks(held[0].graph)
    assert time.process_time() - start < 1.0
    assert len(stack.layers) == 450
