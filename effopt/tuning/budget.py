"""A budget of quality: `kl<=0.05,agreement>=0.98,bits_per_byte<=1.02x`. All of its parts must hold."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from effopt.errors import OptionError, unknown

METRICS: Mapping[str, str] = {"kl": "<=", "agreement": ">=", "bits_per_byte": "<="}
"""Name -> how it is bounded. KL divergence from the uncompressed model in nats a token, the share of tokens,
0 to 1, with its first choice, and bits per byte of text."""

_PART = re.compile(r"\s*(?P<metric>\w+)\s*(?P<sign><=|>=|<|>|==?)\s*(?P<limit>[^\s,x]+)(?P<times>x?)\s*")


@dataclass(frozen=True)
class Limit:
    """A bound on one metric."""

    metric: str
    value: float
    is_relative: bool = False
    """Whether `value` is a multiple of the uncompressed model's figure."""

    def bound(self, uncompressed: Mapping[str, float]) -> float:
        """The bound as a figure of the metric."""
        return self.value * uncompressed[self.metric] if self.is_relative else self.value

    def holds(self, metrics: Mapping[str, float], uncompressed: Mapping[str, float]) -> bool:
        """Whether the metric keeps to the bound. One that is not finite does not."""
        value, bound = metrics[self.metric], self.bound(uncompressed)
        within = value <= bound if METRICS[self.metric] == "<=" else value >= bound
        return math.isfinite(value) and within

    def share(self, metrics: Mapping[str, float], uncompressed: Mapping[str, float]) -> float:
        """How much of the way from the uncompressed model to the bound was gone: 0 to 1, or more."""
        way = self.bound(uncompressed) - uncompressed[self.metric]
        gone = metrics[self.metric] - uncompressed[self.metric]
        if METRICS[self.metric] == ">=":
            way, gone = -way, -gone
        if not math.isfinite(metrics[self.metric]):
            return math.inf
        if way <= 0:
            return 0.0 if gone <= 0 else math.inf
        return max(gone / way, 0.0)

    def __str__(self) -> str:
        return f"{self.metric}{METRICS[self.metric]}{self.value:g}{'x' if self.is_relative else ''}"


@dataclass(frozen=True)
class Budget:
    """Limits that must all hold."""

    limits: tuple[Limit, ...]

    @staticmethod
    def parse(text: str) -> Budget:
        """Read `metric<=value` parts with commas between them. Raises OptionError."""
        if not isinstance(text, str) or not text.strip():
            raise OptionError(f"the budget must be text such as 'kl<=0.05', got {text!r}")
        limits = tuple(_limit(part) for part in text.split(","))
        names = [limit.metric for limit in limits]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise OptionError(f"the budget {text!r} bounds {twice!r} twice")
        return Budget(limits)

    def broken(self, metrics: Mapping[str, float], uncompressed: Mapping[str, float]) -> tuple[Limit, ...]:
        """The limits that do not hold."""
        return tuple(limit for limit in self.limits if not limit.holds(metrics, uncompressed))

    def share(self, metrics: Mapping[str, float], uncompressed: Mapping[str, float]) -> float:
        """How much of the budget is used: the largest share of a limit."""
        return max(limit.share(metrics, uncompressed) for limit in self.limits)

    def __str__(self) -> str:
        return ",".join(map(str, self.limits))


def _limit(part: str) -> Limit:
    found = _PART.fullmatch(part)
    if found is None:
        raise OptionError(f"cannot read {part.strip()!r} in the budget; expected a part such as 'kl<=0.05'")
    metric = found["metric"]
    if metric not in METRICS:
        raise unknown("metric of the budget", metric, METRICS)
    if found["sign"] != METRICS[metric]:
        raise OptionError(
            f"{metric} is bounded with {METRICS[metric]}: write '{metric}{METRICS[metric]}{found['limit']}',"
            f" not {part.strip()!r}"
        )
    try:
        value = float(found["limit"])
    except ValueError:
        raise OptionError(f"{found['limit']!r} in the budget is not a number") from None
    is_relative = bool(found["times"])
    if not math.isfinite(value) or value < 0 or (metric == "agreement" and value > 1):
        raise OptionError(f"{part.strip()!r}: {metric} cannot be bounded by {found['limit']}")
    if is_relative and metric != "bits_per_byte":
        raise OptionError(
            f"{part.strip()!r}: {metric} is relative to the uncompressed model already; write it without x"
        )
    return Limit(metric, value, is_relative)
