"""Recognition: every spelling of an idea becomes one canonical op, so that later passes match one node."""

from __future__ import annotations

from effopt.passes.base import Pass
from effopt.passes.canonicalize.recognize_activation import RecognizeActivation
from effopt.passes.canonicalize.recognize_attention import RecognizeAttention
from effopt.passes.canonicalize.recognize_chunked_attention import RecognizeChunkedAttention
from effopt.passes.canonicalize.recognize_cumulative_attention import RecognizeCumulativeAttention
from effopt.passes.canonicalize.recognize_glu import RecognizeGLU
from effopt.passes.canonicalize.recognize_layer_norm import RecognizeLayerNorm
from effopt.passes.canonicalize.recognize_linear import RecognizeLinear
from effopt.passes.canonicalize.recognize_linear_attention import RecognizeLinearAttention
from effopt.passes.canonicalize.recognize_recurrent_attention import RecognizeRecurrentAttention
from effopt.passes.canonicalize.recognize_rms_norm import RecognizeRMSNorm
from effopt.passes.canonicalize.recognize_rope import RecognizeRoPE
from effopt.passes.canonicalize.recognize_sdpa_call import RecognizeSDPACall
from effopt.passes.canonicalize.recognize_selective_scan import RecognizeSelectiveScan
from effopt.passes.canonicalize.shield_softmax import ShieldSoftmax
from effopt.passes.canonicalize.spell_einsum import SpellEinsum
from effopt.passes.canonicalize.spell_mask_buffers import SpellMaskBuffers
from effopt.passes.canonicalize.spell_softmax import SpellSoftmax
from effopt.passes.canonicalize.stack_before_pointwise import StackBeforePointwise

PASSES: tuple[type[Pass], ...] = (
    SpellMaskBuffers,
    RecognizeChunkedAttention,
    SpellEinsum,
    SpellSoftmax,
    StackBeforePointwise,
    RecognizeAttention,
    RecognizeSDPACall,
    RecognizeLinearAttention,
    RecognizeCumulativeAttention,
    RecognizeRecurrentAttention,
    RecognizeSelectiveScan,
    RecognizeLayerNorm,
    RecognizeRMSNorm,
    RecognizeActivation,
    RecognizeGLU,
    RecognizeRoPE,
    RecognizeLinear,
    ShieldSoftmax,
)
