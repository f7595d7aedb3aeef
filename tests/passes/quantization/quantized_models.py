"""Models and calls for quantising passes."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

from effopt.compile import effopt, record
from effopt.plugins.report import Report
from tests.models.architectures import build, main_output
from tests.models.plain import Plain

SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def model_and_inputs(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A small model in float64, so that a wrong code cannot pass for rounding."""
    torch.manual_seed(0)
    ids = torch.randint(3, 100, (2, 7))
    if name == "plain":
        return Plain(2).double().eval(), {"input_ids": ids}
    if name == "vit":
        config: Any = transformers.ViTConfig(**SMALL, intermediate_size=112, image_size=16, patch_size=8)
        model: nn.Module = transformers.ViTModel(config)
        return model.double().eval(), {"pixel_values": torch.randn(2, 3, 16, 16, dtype=torch.float64)}
    if name == "t5":
        config = transformers.T5Config(
            vocab_size=100, d_model=64, d_kv=16, d_ff=112, num_layers=2, num_heads=4, use_cache=False
        )
        model = transformers.T5ForConditionalGeneration(config)
        return model.double().eval(), {"input_ids": ids, "decoder_input_ids": ids[:, :4]}
    model, _ = build(name)
    # The experts' grouped_mm has no float64.
    return model if name == "mixtral" else model.double(), {"input_ids": ids}


def output_of(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else main_output(result)


def run(model: nn.Module, inputs: dict[str, Any], passes: str, **options: Any) -> tuple[torch.Tensor, Report]:
    torch._dynamo.reset()
    settings = {"lowering": "eager", "passes": passes, **options}
    with torch.no_grad(), record() as report:
        result = torch.compile(model, backend=effopt, options=settings)(**inputs)
    assert not report.faults
    return output_of(result), report


def reasons(report: Report) -> list[str]:
    return [r.reason for r in report.rejected if r.pass_name == "quantize-weights"]


def spec(bits: int, group: int, symmetric: bool, **more: Any) -> str:
    given = {"bits": bits, "group": group, "symmetric": str(symmetric).lower(), **more}
    return f"quantize-weights{{{','.join(f'{k}={v}' for k, v in given.items())}}}"


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 24, bias=False)).double()
