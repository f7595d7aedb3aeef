"""Key-value caches: shared between layers, or shrunk. Lossy: on request only; none yet."""

from __future__ import annotations

from effopt.passes.base import Pass

PASSES: tuple[type[Pass], ...] = ()
