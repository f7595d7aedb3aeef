"""Quantisation: weights and activations in fewer bits. Lossy: on request only; none yet."""

from __future__ import annotations

from effopt.passes.base import Pass

PASSES: tuple[type[Pass], ...] = ()
