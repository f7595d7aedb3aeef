"""What `effopt.tune` did: each choice, taken or not, with what it saves, what it costs, and why."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effopt.tuning.measure import Cost


@dataclass(frozen=True)
class TriedChoice:
    """One choice at one place."""

    pass_name: str
    path: str
    """Of the layer or site."""
    decision: Any
    """What would be done there, as JSON."""
    is_accepted: bool
    saving: float
    """Of the objective, alone, as a share of the uncompressed model's: 0 to 1."""
    budget_share: float
    """Of the budget, that it uses up alone; 1 is all of it. NaN if it was not measured."""
    alone: Mapping[str, float] | None
    """Metrics with this choice alone, on the calibration split; None if it was not measured."""
    reason: str
    """Why it was not accepted; empty if it was."""

    @property
    def told(self) -> str:
        """The decision in few words: `bits=4 group=32`."""
        return told(self.decision)


@dataclass(frozen=True)
class LeftPlace:
    """A place where a pass offers nothing."""

    pass_name: str
    path: str
    reason: str


@dataclass(frozen=True)
class TuningReport:
    """The whole story. The figures are of the plan, carried out as `options={"plans": plan}` does."""

    budget: str
    objective: str
    uncompressed: Mapping[str, Mapping[str, float]]
    """`calibration` and `validation` -> metrics."""
    compressed: Mapping[str, Mapping[str, float]]
    cost_before: Cost
    cost_after: Cost
    choices: tuple[TriedChoice, ...]
    left: tuple[LeftPlace, ...]
    impossible: str
    """Why nothing could be accepted: the uncompressed model itself breaks the budget. Empty otherwise."""
    measurements: int
    """How often a candidate was run over a split."""

    @property
    def accepted(self) -> tuple[TriedChoice, ...]:
        """What the plan does."""
        return tuple(choice for choice in self.choices if choice.is_accepted)

    @property
    def reverted(self) -> tuple[TriedChoice, ...]:
        """What it does not, each with its reason."""
        return tuple(choice for choice in self.choices if not choice.is_accepted)

    def summary(self) -> str:
        """One paragraph."""
        if self.impossible:
            return f"Nothing fits {self.budget}: for the uncompressed model, {self.impossible}."
        before, after = self.cost_before.of(self.objective), self.cost_after.of(self.objective)
        found = ", ".join(f"{name} {value:.4g}" for name, value in self.compressed["validation"].items())
        return (
            f"{len(self.accepted)} of {len(self.choices)} choices accepted within {self.budget}; on the"
            f" validation split {found}. Predicted {self.objective} a call: {before:.4g} -> {after:.4g}"
            f" ({after / before - 1:+.1%})."
        )

    def __str__(self) -> str:
        lines = [self.summary()]
        for choice in self.choices:
            done = "accepted" if choice.is_accepted else f"left: {choice.reason}"
            figures = f"saves {choice.saving:.2%}, budget {choice.budget_share:.1%}"
            lines.append(f"  {choice.pass_name} {choice.path} {choice.told}: {figures}; {done}")
        lines += [f"  {place.pass_name} {place.path}: {place.reason}" for place in self.left]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """For JSON. What is not finite is text."""
        return {"format": "effopt-tuning/1", **_plain(dataclasses.asdict(self))}

    def to_json(self, path: str | Path | None = None) -> str:
        """As JSON text (layout `effopt-tuning/1`), also written to `path` if one is given."""
        text = json.dumps(self.to_dict(), indent=1)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text


def told(decision: Any) -> str:
    """A decision in few words."""
    if isinstance(decision, Mapping):
        return " ".join(f"{key}={json.dumps(value)}" for key, value in decision.items())
    return decision if isinstance(decision, str) else json.dumps(decision)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
