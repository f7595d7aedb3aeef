"""The canonical ops, one a file. A new meaning is a file here and a line below."""

from effopt.graph.ops.antidiagonal_blocks import antidiagonal_blocks
from effopt.graph.ops.attention import attention
from effopt.graph.ops.attention_lse import attention_lse
from effopt.graph.ops.base import Op, Operands, Sample
from effopt.graph.ops.block_sparse_attention import block_sparse_attention
from effopt.graph.ops.fixed_blocks import local_blocks, strided_blocks
from effopt.graph.ops.glu import glu
from effopt.graph.ops.int8_linear import int8_linear
from effopt.graph.ops.layer_norm import add_layer_norm, layer_norm
from effopt.graph.ops.linear import linear
from effopt.graph.ops.linear_attention import linear_attention
from effopt.graph.ops.merge_attention import merge_attention
from effopt.graph.ops.paged_attention import paged_attention
from effopt.graph.ops.quantized_embedding import quantized_embedding
from effopt.graph.ops.quantized_linear import quantized_linear
from effopt.graph.ops.region_blocks import region_blocks
from effopt.graph.ops.rms_norm import add_rms_norm, rms_norm
from effopt.graph.ops.rope import rope
from effopt.graph.ops.selective_scan import selective_scan

OPS: tuple[Op, ...] = (
    attention,
    attention_lse,
    merge_attention,
    paged_attention,
    block_sparse_attention,
    antidiagonal_blocks,
    local_blocks,
    strided_blocks,
    region_blocks,
    rms_norm,
    add_rms_norm,
    layer_norm,
    add_layer_norm,
    glu,
    rope,
    linear,
    quantized_linear,
    int8_linear,
    quantized_embedding,
    selective_scan,
    linear_attention,
)

__all__ = [
    "OPS",
    "Op",
    "Operands",
    "Sample",
    "add_layer_norm",
    "add_rms_norm",
    "antidiagonal_blocks",
    "attention",
    "attention_lse",
    "block_sparse_attention",
    "glu",
    "int8_linear",
    "layer_norm",
    "linear",
    "linear_attention",
    "local_blocks",
    "merge_attention",
    "paged_attention",
    "quantized_embedding",
    "quantized_linear",
    "region_blocks",
    "rms_norm",
    "rope",
    "selective_scan",
    "strided_blocks",
]
