"""Attention: what is proved about its masks, and techniques that replace it."""

from __future__ import annotations

from effopt.passes.attention.keep_sink_and_local_blocks import KeepSinkAndLocalBlocks
from effopt.passes.attention.prove_causal import ProveCausal
from effopt.passes.attention.prove_rows_see_key import ProveRowsSeeKey
from effopt.passes.attention.rebase_positions import RebasePositions
from effopt.passes.attention.recognize_paged_attention import RecognizePagedAttention
from effopt.passes.attention.recover_mask_structure import RecoverMaskStructure
from effopt.passes.attention.reuse_blocks_between_steps import ReuseBlocksBetweenSteps
from effopt.passes.attention.route_attention_by_region import RouteAttentionByRegion
from effopt.passes.attention.scale_positions import ScalePositions
from effopt.passes.attention.select_blocks_by_antidiagonal import SelectBlocksByAntidiagonal
from effopt.passes.attention.split_attention_by_axis import SplitAttentionByAxis
from effopt.passes.attention.split_shared_prefix import SplitSharedPrefix
from effopt.passes.attention.stride_blocks_by_head import StrideBlocksByHead
from effopt.passes.base import Pass

PASSES: tuple[type[Pass], ...] = (
    ProveCausal,
    RecognizePagedAttention,
    SplitAttentionByAxis,
    RecoverMaskStructure,
    ProveRowsSeeKey,
    SplitSharedPrefix,
    ScalePositions,
    RebasePositions,
    SelectBlocksByAntidiagonal,
    KeepSinkAndLocalBlocks,
    StrideBlocksByHead,
    RouteAttentionByRegion,
    ReuseBlocksBetweenSteps,
)
