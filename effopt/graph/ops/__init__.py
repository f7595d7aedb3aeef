"""The canonical ops, one a file. A new meaning is a file here and a line below."""

from effopt.graph.ops.attention import attention
from effopt.graph.ops.base import Op, Operands, Sample
from effopt.graph.ops.glu import glu
from effopt.graph.ops.layer_norm import add_layer_norm, layer_norm
from effopt.graph.ops.linear import linear
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
    "layer_norm",
    "linear",
    "rms_norm",
    "rope",
]
