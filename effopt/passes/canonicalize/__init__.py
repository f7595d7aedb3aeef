"""Recognition."""

from __future__ import annotations

from effopt.passes.base import Pass
from effopt.passes.canonicalize.fuse_rms_norm import FuseRMSNorm

PASSES: tuple[type[Pass], ...] = (FuseRMSNorm,)
