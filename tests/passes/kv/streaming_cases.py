"""Plans that let some heads stream, and the calls that follow them."""

from __future__ import annotations

from typing import Any

import torch

import effopt
from effopt.passes.plan import Entry, PlannedStack, Section
from tests.models import architectures
from tests.models.streaming_twin import streaming_twin_of

NAME = "split-heads-by-role"
SINK, RECENT = 2, 5
STREAMS: dict[str, list[list[int]]] = {
    "grouped": [[1], [0, 1]],
    "single": [[0, 2], [0, 1, 2, 3]],
}


def plan_of(model: Any, streams: list[list[int]], sink: int = SINK, recent: int = RECENT) -> effopt.Plan:
    """A plan for these KV heads of each layer, through JSON as one that was saved."""
    base = "transformer.h" if model.config.model_type == "gpt2" else "model.layers"
    entries = [
        Entry(
            f"{base}.{i}",
            type(model.get_submodule(f"{base}.{i}")).__name__,
            {"streaming": heads, "sink": sink, "recent": recent} if heads else None,
        )
        for i, heads in enumerate(streams)
    ]
    section = Section(f"{NAME}{{sink={sink},recent={recent}}}", (PlannedStack(64, tuple(entries)),))
    return effopt.Plan.from_json(effopt.Plan((section,)).to_json())


def batch(rows: int = 2, length: int = 20) -> dict[str, Any]:
    torch.manual_seed(2)
    return {"input_ids": torch.randint(3, 100, (rows, length)), "use_cache": False}


def decisions(plan: effopt.Plan) -> dict[int, Any]:
    return {i: entry.decision for i, entry in enumerate(plan.sections[0].entries)}


def small(name: str) -> Any:
    """Two layers, weights large enough for the heads to matter."""
    model = architectures.build(name, "sdpa", use_cache=True)[0]
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.dim() > 1):
            weight.mul_(4)
    return model


def case(name: str) -> tuple[Any, effopt.Plan, Any]:
    """A model, a plan for it, and its twin."""
    model = small(name)
    plan = plan_of(model, STREAMS["single" if name == "gpt2" else "grouped"])
    return model, plan, streaming_twin_of(model, decisions(plan))
