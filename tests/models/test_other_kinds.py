"""Models of vision, sound, several inputs, and encoders with decoders: their results, and each attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from effopt.compile import effopt, record
from effopt.passes.canonicalize.recognize_attention import RecognizeAttention
from effopt.plugins.report import Report
from tests.models.architectures import sampled
from tests.models.other_kinds import OTHER_KINDS, all_outputs, build_other

# Their forward passes convert tensors to numbers, or write to captured ones, while Dynamo traces (5.23).
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")

SMALL = ("vitdet", "sew-d")
CALLING_SDPA = ("vit", "beit", "swin", "dinov2", "clip", "hiera", "whisper", "wav2vec2", "bart", "esm")
TRAINED = (
    *("swinv2", "vitdet", "timesformer", "wavlm", "clap"),
    *("bart", "t5", "prophetnet", "layoutlmv3", "funnel", "patchtst"),
)
GENERATING = ("t5", "umt5", "bart", "mbart", "pegasus", "marian", "m2m-100", "blenderbot", "bigbird-pegasus")


def outputs(function: Callable[..., Any], inputs: dict[str, Tensor]) -> list[Tensor]:
    """All that it returns; Informer draws keys, so that each run begins at one seed."""
    torch.manual_seed(0)
    return all_outputs(function(**inputs))


def compiled(model: torch.nn.Module) -> Any:
    torch._dynamo.reset()

    def backend(module: Any, example_inputs: Any) -> Any:
        return effopt(module, example_inputs, options={"lowering": "eager"})

    return torch.compile(model, backend=backend)


def assert_recognised(name: str, report: Report) -> None:
    """All blocks but those that the row leaves, of which there is a reason."""
    row = OTHER_KINDS[name]
    assert report.ops["attention"] == row.attention_blocks - row.left, report.rejected
    reasons = [r.reason for r in report.rejected if r.pass_name == RecognizeAttention.name]
    assert bool(reasons) or not row.left


def distance(got: list[Tensor], wanted: list[Tensor]) -> float:
    """The greatest of all outputs."""
    pairs = [(g, w) for g, w in zip(got, wanted, strict=True) if w.numel()]
    return max(float((g - w).norm() / w.norm().clamp_min(1e-12)) for g, w in pairs)


def compare(name: str, attn: str) -> Report:
    model, inputs = build_other(name, attn)
    with torch.no_grad():
        wanted = outputs(model, inputs)
        with record() as report:
            got = outputs(compiled(model), inputs)
    assert distance(got, wanted) < 2e-5
    return report


@pytest.mark.parametrize("name", sampled(OTHER_KINDS, *SMALL))
def test_inference(name: str) -> None:
    assert_recognised(name, compare(name, "eager"))


@pytest.mark.parametrize("name", sampled(CALLING_SDPA))
def test_library_calls(name: str) -> None:
    assert compare(name, "sdpa").ops["attention"] == OTHER_KINDS[name].attention_blocks


@pytest.mark.parametrize("name", sampled(TRAINED, "patchtst"))
def test_gradients(name: str) -> None:
    model, inputs = build_other(name)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(function: Any) -> Tensor:
        total = sum(x.square().sum() for x in outputs(function, inputs))
        found = torch.autograd.grad(total, parameters, allow_unused=True)  # type: ignore[arg-type]
        return torch.cat([g.flatten() for g in found if g is not None])

    with record() as report:
        got = gradients(compiled(model))
    assert_recognised(name, report)
    # Of all together: a key bias has gradient 0, so that its own is rounding alone.
    assert distance([got], [gradients(model)]) < 1e-3


def tokens(model: Any, inputs: dict[str, Tensor], cache: str) -> Any:
    """Nine greedy tokens; `generate` is kept from compiling anything itself."""
    lengths = {"min_new_tokens": 9, "max_new_tokens": 9}
    extra = {"cache_implementation": "static"} if cache == "static" else {}
    options = {**lengths, **extra, "do_sample": False, "num_beams": 1, "disable_compile": True}
    return model.generate(inputs["input_ids"], **options).tolist()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", sampled(GENERATING))
def test_generated_tokens(name: str, cache: str) -> None:
    """With a cache of the decoder's own keys and one of the encoder's."""
    model, inputs = build_other(name, "sdpa", use_cache=True, init_std=0.4, initializer_factor=8.0)
    expected = tokens(model, inputs, cache)
    model.forward = compiled(model.forward)
    with record() as report:
        assert tokens(model, inputs, cache) == expected
    assert report.ops["attention"]
    assert len({token for row in expected for token in row}) > 3
