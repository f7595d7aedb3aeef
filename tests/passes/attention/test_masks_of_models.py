"""What is proved of masks of real models, with the results of eager: windows, documents, padding, caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from effopt.compile import effopt, record
from effopt.plugins.report import Report
from tests.models.architectures import build, main_output

NAME = "recover-mask-structure"
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def run(model: torch.nn.Module, inputs: Any, **more: Any) -> tuple[torch.Tensor, Report]:
    torch._dynamo.reset()
    with record() as report:
        backend = lambda module, given: effopt(module, given, options={"lowering": "eager"})  # noqa: E731
        out = main_output(torch.compile(model, backend=backend)(**inputs, **more))
    return out, report


def notes(report: Report) -> list[str]:
    return [a.note for a in report.applied if a.pass_name == NAME]


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


def is_close(model: torch.nn.Module, inputs: Any, out: torch.Tensor) -> bool:
    return distance(out, main_output(model(**inputs))) < 2e-5


EITHER = pytest.mark.parametrize("attn", ["eager", pytest.param("sdpa", marks=pytest.mark.slow)])


@EITHER
@pytest.mark.parametrize(
    ("name", "windows"), [("gemma2", 1), ("mistral", 2), pytest.param("gpt-oss", 1, marks=pytest.mark.slow)]
)
def test_windows(name: str, windows: int, attn: str) -> None:
    model, inputs = build(name, attn, length=40)
    with torch.no_grad():
        out, report = run(model, inputs)
        assert is_close(model, inputs, out)
    assert notes(report) == ["keys -7 .. 0 of the query"] * windows
    assert report.counts["prove-causal"] == 2 - windows
    layers = {a.layer for a in report.applied if a.pass_name == NAME}
    assert len(layers) == windows


@EITHER
def test_gradients_through_a_window(attn: str) -> None:
    model, inputs = build("mistral", attn, length=40)
    model.train()
    out, report = run(model, inputs)
    assert len(notes(report)) == 2
    direction = torch.randn_like(out)
    parameters = list(model.parameters())
    pairs = [
        torch.autograd.grad((x * direction).sum(), parameters) for x in (out, main_output(model(**inputs)))
    ]
    assert distance(*(torch.cat([g.flatten() for g in p]) for p in pairs)) < 1e-3


@EITHER
def test_packed_rows(attn: str) -> None:
    model, inputs = build("mistral", attn)
    positions = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4], [*range(12)]])}
    with torch.no_grad():
        out, report = run(model, inputs | positions)
        assert is_close(model, inputs | positions, out)
    assert notes(report) == ["keys -7 .. 0 of the query, documents"] * 2


@EITHER
def test_padding(attn: str) -> None:
    """On the left: rows of padding see no key at all."""
    model, inputs = build("llama", attn)
    inputs["attention_mask"] = torch.tensor([[0] * 3 + [1] * 9, [1] * 12])
    with torch.no_grad():
        out, report = run(model, inputs)
        assert is_close(model, inputs, out)
    assert len(notes(report)) == 2
    assert all(n.startswith("keys from the first .. 0 of the query; the mask") for n in notes(report))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_decoding_with_a_cache(kind: str) -> None:
    """A prompt of 12 tokens and 3 more, one at a time, over windows of 8."""
    model, inputs = build("mistral", "sdpa", use_cache=True)
    more = torch.randint(3, 100, (2, 3), generator=torch.Generator().manual_seed(1))

    def decoded(call: Any) -> torch.Tensor:
        config = model.config
        cache = (
            DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=32)
        )
        out = [main_output(call(**inputs, past_key_values=cache))]
        out += [main_output(call(input_ids=more[:, i : i + 1], past_key_values=cache)) for i in range(3)]
        return torch.cat(out, 1)

    torch._dynamo.reset()
    with torch.no_grad(), record() as report:
        backend = lambda module, given: effopt(module, given, options={"lowering": "eager"})  # noqa: E731
        got = decoded(torch.compile(model, backend=backend))
        assert distance(got, decoded(model)) < 2e-5
    assert notes(report)


def reasons(report: Report) -> str:
    return " | ".join(r.reason for r in report.rejected if r.pass_name == NAME)


def test_what_other_models_have() -> None:
    """ALiBi beside a causal mask, a table of distances, a mask that the model holds as a buffer."""
    found = {}
    for name in ("bloom", "t5-encoder", "gpt-neo", "gpt2"):
        model, inputs = build(name, "eager")
        with torch.no_grad():
            out, found[name] = run(model, inputs)
            assert is_close(model, inputs, out)
    assert all("0 of the query; the bias" in n and "alibi" in n for n in notes(found["bloom"]))
    assert len(notes(found["bloom"])) == 2
    assert "relative table" in reasons(found["t5-encoder"])
    assert found["gpt-neo"].counts["spell-mask-buffers"] == 2
    assert all("0 of the query" in n for n in notes(found["gpt-neo"]))
    assert found["gpt2"].counts["prove-causal"] == 2
