"""Layers: those that a model can do without are skipped or dropped. Lossy: on request only; none yet."""

from __future__ import annotations

from effopt.passes.base import Pass

PASSES: tuple[type[Pass], ...] = ()
