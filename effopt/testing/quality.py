"""How good a language model is, and how far it has moved from its uncompressed self.

    quality = evaluate(compressed, texts, reference=model, probes=probes, tier=QUICK)
    quality.kl.value, quality.bits_per_byte.high, quality.recall[512]
    quality.difference(evaluate(model, texts, probes=probes, tier=QUICK))["bits_per_byte"]

Texts and probes come from the caller. Intervals are 95 % percentile bootstraps over texts (over probes for
recall): whole texts are drawn again with replacement, since the tokens of one text are not independent. The
same arguments give the same numbers.
"""

from __future__ import annotations

from effopt.quality.bootstrap import Interval
from effopt.quality.evaluate import Quality, evaluate
from effopt.quality.texts import FULL, QUICK, Probe, Text, Tier

__all__ = ["FULL", "QUICK", "Interval", "Probe", "Quality", "Text", "Tier", "evaluate"]
