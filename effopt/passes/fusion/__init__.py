"""Fusion: canonical ops that stand beside each other become one, with less memory traffic.

Recognition is itself the fusion of a gated unit or a rotation:
see docs/design/0002-recognition-is-the-fusion.md.
"""

from __future__ import annotations

from effopt.passes.base import Pass
from effopt.passes.fusion.fuse_residual_norm import FuseResidualNorm
from effopt.passes.fusion.pack_projections import PackProjections

PASSES: tuple[type[Pass], ...] = (FuseResidualNorm, PackProjections)
