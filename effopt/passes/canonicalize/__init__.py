"""Recognition: every spelling of an idea becomes one canonical op, so that later passes match one node."""

from __future__ import annotations

from effopt.passes.base import Pass
from effopt.passes.canonicalize.recognize_rms_norm import RecognizeRMSNorm

PASSES: tuple[type[Pass], ...] = (RecognizeRMSNorm,)
