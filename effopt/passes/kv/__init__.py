"""TBD."""

from __future__ import annotations

from effopt.passes.base import Pass

PASSES: tuple[type[Pass], ...] = ()
