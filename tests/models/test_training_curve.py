"""Training the tiny language model through Inductor: the loss curve of eager, as far as float32 tells."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "tiny_lm"
sys.path.insert(0, str(EXAMPLE))
try:
    data, tiny = (importlib.import_module(name) for name in ("data", "model"))
finally:
    sys.path.remove(str(EXAMPLE))

STEPS = 50


def curve(model: Any, call: Callable[..., Any], size: int, length: int) -> torch.Tensor:
    """Loss in nats a token of each step. AdamW: the example's Muon rounds its steps to bfloat16."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    losses = []
    for step in range(STEPS):
        tokens, weights = data.batch(0, step, size, length, step * size, 0.0, 1.0)
        logits = call(input_ids=tokens[:, :-1]).logits
        each = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        loss = (each * weights.flatten()).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize(
    ("sizes", "attention", "size", "length"),
    [
        ({"layers": 3, "hidden": 64, "context": 64}, "eager", 4, 48),
        pytest.param({"layers": 12, "hidden": 256}, "sdpa", 4, 128, marks=pytest.mark.slow),
    ],
    ids=["small", "whole"],
)
def test_same_losses_as_eager(sizes: dict[str, int], attention: str, size: int, length: int) -> None:
    """Noise is what eager itself does to weights that differ in their last bits."""
    torch.manual_seed(0)
    model = tiny.build(tiny.config(**sizes), attention).train()
    same, moved = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for p in moved.parameters():
            p.mul_(1 + 2e-7 * torch.randn_like(p))
    eager = curve(model, model, size, length)
    torch._dynamo.reset()
    compiled = curve(same, torch.compile(same, backend="effopt"), size, length)
    noise = (curve(moved, moved, size, length) - eager).abs().max()
    assert eager[-1] < eager[0] - 1.0, "nothing was learned: the curve says nothing"
    off = (compiled - eager).abs().max()
    assert off <= 10 * noise, f"{off:.1e} off, where rounding makes {noise:.1e}"
    assert off <= 1e-3
