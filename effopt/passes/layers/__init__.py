"""Layers: those that a model can do without are skipped or dropped. Lossy: on request only."""

from __future__ import annotations

from effopt.passes.base import Pass
from effopt.passes.layers.drop_layers import DropLayers
from effopt.passes.layers.skip_layers import SkipLayers

PASSES: tuple[type[Pass], ...] = (SkipLayers, DropLayers)
