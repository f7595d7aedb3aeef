"""Models whose original weights were released."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from effopt.compile import effopt
from effopt.plugins.report import Report

FOUR_BITS = "quantize-weights{bits=4,group=128}"
EAGER = {"lowering": "eager"}


def compile_released(model: Any, passes: str = "quantize-weights{bits=4,group=16}", **options: Any) -> Any:
    return torch.compile(
        model, backend=effopt, options={**EAGER, "passes": passes, "release_weights": True, **options}
    )


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 24), nn.LayerNorm(24))


def released_layers() -> tuple[nn.Sequential, Any, torch.Tensor, torch.Tensor]:
    """A model whose weights were freed, its compiled form, an input and what it gives."""
    model, x = layers(), torch.randn(5, 32)
    compiled = compile_released(model)
    with torch.no_grad():
        return model, compiled, x, compiled(x)


def resident(*owners: nn.Module) -> int:
    memories = (t.untyped_storage() for m in owners for t in (*m.parameters(), *m.buffers()))
    return sum({m._cdata: m.nbytes() for m in memories}.values())


def records(report: Report) -> tuple[list[str], list[str]]:
    freed = [a.note for a in report.applied if a.pass_name == "release-weights"]
    return freed, [r.reason for r in report.rejected if r.pass_name == "release-weights"]
