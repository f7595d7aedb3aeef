"""Quantisation: weights and activations in fewer bits. Lossy: on request only."""

from __future__ import annotations

from effopt.passes.base import Pass
from effopt.passes.quantization.quantize_activations import QuantizeActivations
from effopt.passes.quantization.quantize_weights import QuantizeWeights

PASSES: tuple[type[Pass], ...] = (QuantizeWeights, QuantizeActivations)
