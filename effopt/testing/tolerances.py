"""The tolerance table, for tests."""

from __future__ import annotations

from effopt.graph.tolerances import GRADIENT_FACTOR, TOLERANCES, Tolerance, tolerance_of

__all__ = ["GRADIENT_FACTOR", "TOLERANCES", "Tolerance", "tolerance_of"]
