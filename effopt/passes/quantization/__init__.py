"""Quantisation: weights and activations in fewer bits. Lossy, so only when asked for; none yet."""

from __future__ import annotations

from effopt.passes.base import Pass

PASSES: tuple[type[Pass], ...] = ()
