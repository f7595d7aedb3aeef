"""The figures of each way to compress a model, and which of them nothing beats."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from effopt.bench import Ratio, ratio_of
from effopt.passes.plan import Plan
from effopt.quality.evaluate import Quality
from effopt.tradeoff.pareto import front

FORMAT = "effopt-tradeoff/1"


@dataclass(frozen=True)
class Way:
    """One way to compress: passes added to the exact pipeline, or a plan; with neither, nothing is lost."""

    passes: str = ""
    plan: Plan | None = None
    label: str = ""

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.label or self.passes or "uncompressed"


@dataclass(frozen=True)
class Untouched:
    """Places that a pass was asked to change and left, for one reason."""

    pass_name: str
    reason: str
    places: int
    """0 if the reason is of no place: the pass found nothing to do."""


@dataclass(frozen=True)
class Row:
    """What was found of one way. A figure is None if it could not be had; `notes` or `error` say why."""

    way: Way
    quality: Quality | None = None
    """Against the uncompressed model, run eagerly."""
    weight_bytes: int | None = None
    """Of all that the model and its compiled graphs hold, once what they do not read is freed."""
    kv_bytes: int | None = None
    """Of the keys and values of one row in a full cache."""
    flops_a_token: float | None = None
    """Predicted, of a decoded token."""
    bytes_a_token: float | None = None
    """Predicted, moved for a decoded token if every op is one kernel."""
    decode_s: tuple[float, ...] = ()
    """Seconds a token when decoding greedily, one entry a round."""
    compile_s: float = 0.0
    applied: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Pass asked for -> places changed, all graphs together."""
    untouched: tuple[Untouched, ...] = ()
    notes: tuple[str, ...] = ()
    error: str | None = None
    """What was raised; the row has then no figures."""

    @property
    def seconds_a_token(self) -> float | None:
        """Median over rounds."""
        return statistics.median(self.decode_s) if self.decode_s else None

    @property
    def is_refused(self) -> bool:
        """Whether passes were asked for and none of them changed anything: its figures are no success."""
        return bool(self.applied) and not any(self.applied.values())

    @property
    def is_comparable(self) -> bool:
        """Whether it may be on a Pareto front, and may keep others from it."""
        return self.error is None and not self.is_refused

    @property
    def kl(self) -> float | None:
        """Nats a token."""
        return None if self.quality is None or self.quality.kl is None else self.quality.kl.value

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        figures = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[2:]}
        return {
            "name": self.way.name,
            "passes": self.way.passes,
            "plan": None if self.way.plan is None else json.loads(self.way.plan.to_json()),
            "quality": None if self.quality is None else self.quality.to_dict(),
            **figures,
            "untouched": [dataclasses.asdict(left) for left in self.untouched],
            "seconds_a_token": self.seconds_a_token,
            "is_refused": self.is_refused,
        }


@dataclass(frozen=True)
class Axis:
    """A cost: lower is better."""

    name: str
    title: str
    short: str
    unit: str
    of: Callable[[Row], float | None]


AXES = (
    Axis("weight_bytes", "weights", "weights", "B", lambda row: row.weight_bytes),
    Axis("kv_bytes", "KV cache", "KV", "B", lambda row: row.kv_bytes),
    Axis("flops_a_token", "operations a token", "FLOP", "FLOP", lambda row: row.flops_a_token),
    Axis("seconds_a_token", "time a token", "time", "s", lambda row: row.seconds_a_token),
)


@dataclass(frozen=True)
class Tradeoff:
    """All ways over one model and its texts. The first row is the uncompressed model."""

    rows: tuple[Row, ...]
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]

    def front(self, axis: Axis) -> tuple[bool, ...]:
        """Whether each row is on the Pareto front of KL divergence against a cost.

        A row that failed, that was refused or that lacks the figure is not, and keeps no other from it.
        """
        points = []
        for row in self.rows:
            kl, cost = row.kl, axis.of(row)
            points.append((cost, kl) if row.is_comparable and kl is not None and cost is not None else None)
        return front(points)

    def speedup(self, row: Row) -> Ratio | None:
        """How many times faster than the uncompressed model it decodes, round by round."""
        first = self.rows[0]
        if row is first or not row.decode_s or not first.decode_s:
            return None
        return ratio_of(first.decode_s, row.decode_s)

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows that raised."""
        return tuple(row for row in self.rows if row.error is not None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: every figure, every interval, every round, the machine."""
        fronts = {axis.name: self.front(axis) for axis in AXES}
        rows = []
        for index, row in enumerate(self.rows):
            speedup = self.speedup(row)
            rows.append(
                {
                    **row.to_dict(),
                    "speedup": None if speedup is None else dataclasses.asdict(speedup),
                    "pareto": [name for name, on_front in fronts.items() if on_front[index]],
                }
            )
        settings, machine = dict(self.settings), dict(self.machine)
        return {"format": FORMAT, "machine": machine, "settings": settings, "rows": rows}
