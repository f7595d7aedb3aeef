"""The canonical ops, one a file. A new meaning is a file here and a line below."""

from effopt.graph.ops.attention import attention
from effopt.graph.ops.base import Op, Operands, Sample
from effopt.graph.ops.glu import glu
from effopt.graph.ops.int8_linear import int8_linear
from effopt.graph.ops.layer_norm import add_layer_norm, layer_norm
from effopt.graph.ops.linear import linear
from effopt.graph.ops.linear_attention import linear_attention
from effopt.graph.ops.quantized_embedding import quantized_embedding
from effopt.graph.ops.quantized_linear import quantized_linear
from effopt.graph.ops.rms_norm import add_rms_norm, rms_norm
from effopt.graph.ops.rope import rope

OPS: tuple[Op, ...] = (
    attention,
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
    linear_attention,
)

__all__ = [
    "OPS",
    "Op",
    "Operands",
    "Sample",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "glu",
    "int8_linear",
    "layer_norm",
    "linear",
    "linear_attention",
    "quantized_embedding",
    "quantized_linear",
    "rms_norm",
    "rope",
]
