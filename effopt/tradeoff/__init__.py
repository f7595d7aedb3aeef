"""What lossy passes cost in quality and save in bytes, operations and time, side by side on one model.

from effopt.tradeoff import Way, measure
result = measure(model, texts, [Way("quantize-weights{bits=8}"), Way("skip-layers{keep=0.9}")])
result.rows[1].quality.kl, result.speedup(result.rows[1]), result.to_dict()
"""

from __future__ import annotations

from effopt.tradeoff.contender import Decoding
from effopt.tradeoff.measure import measure
from effopt.tradeoff.result import AXES, Row, Tradeoff, Untouched, Way

__all__ = ["AXES", "Decoding", "Row", "Tradeoff", "Untouched", "Way", "measure"]
