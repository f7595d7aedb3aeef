"""Confidence intervals of ratios of sums, by resampling the members that were measured.

Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13 (percentile intervals).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class Ratio:
    """A figure that is a ratio of sums over members, such as texts."""

    numerators: Tensor
    """float64 [n], one for each member."""
    denominators: Tensor

    @classmethod
    def of(cls, numerators: Sequence[float], denominators: Sequence[float] | None = None) -> Ratio:
        """Without denominators, a mean over members."""
        above = torch.tensor(numerators, dtype=torch.float64)
        below = torch.ones_like(above) if denominators is None else torch.tensor(denominators).double()
        return cls(above, below)

    def over(self, drawn: Tensor) -> Tensor:
        """The figure for each row of member indices, float64 [rows]."""
        return self.numerators[drawn].sum(1) / self.denominators[drawn].sum(1)


def bootstrap(ratio: Ratio, resamples: int, seed: int, minus: Ratio | None = None) -> Interval:
    """The figure and its interval; with `minus`, those of the difference of two, on the same members."""
    count = len(ratio.numerators)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (resamples, count), generator=generator)
    all_once = torch.arange(count)[None]
    value, spread = ratio.over(all_once), ratio.over(drawn)
    if minus is not None:
        value, spread = value - minus.over(all_once), spread - minus.over(drawn)
    low, high = torch.quantile(spread, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(float(value), low, high)
