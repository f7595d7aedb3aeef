"""Key-value caches: shared between layers, or shrunk. Lossy: on request only."""

from __future__ import annotations

from effopt.passes.base import Pass
from effopt.passes.kv.share_kv_across_layers import ShareKVAcrossLayers
from effopt.passes.kv.split_heads_by_role import SplitHeadsByRole

PASSES: tuple[type[Pass], ...] = (ShareKVAcrossLayers, SplitHeadsByRole)
