"""Key-value caches: shared between layers, or shrunk. Lossy: on request only."""

from __future__ import annotations

from effopt.passes.base import Pass
from effopt.passes.kv.share_kv_across_layers import ShareKVAcrossLayers

PASSES: tuple[type[Pass], ...] = (ShareKVAcrossLayers,)
