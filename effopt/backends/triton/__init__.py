"""Triton kernels, one op family a file: the jitted kernels, a checked host function, its `Lowering`.

They run compiled on a GPU (CUDA sm_80 and newer, gfx942), and in Triton's interpreter on CPU tensors
if TRITON_INTERPRET=1 was set before this package was imported. Without Triton installed `LOWERINGS` is
empty and nothing here is imported; the references run instead.
"""

from importlib.util import find_spec

from effopt.backends.base import Lowering

LOWERINGS: tuple[Lowering, ...] = ()

if find_spec("triton") is not None:
    from effopt.backends.triton.attention_lse import ATTENTION_LSE
    from effopt.backends.triton.block_sparse_attention import BLOCK_SPARSE_ATTENTION
    from effopt.backends.triton.decode_attention import DECODE_ATTENTION
    from effopt.backends.triton.flash_attention import FLASH_ATTENTION
    from effopt.backends.triton.glu import GLU
    from effopt.backends.triton.int8_linear import INT8_LINEAR
    from effopt.backends.triton.layer_norm import ADD_LAYER_NORM, LAYER_NORM
    from effopt.backends.triton.linear_attention_backward import LINEAR_ATTENTION
    from effopt.backends.triton.paged_attention import PAGED_ATTENTION
    from effopt.backends.triton.quantized_linear import QUANTIZED_LINEAR
    from effopt.backends.triton.rms_norm import ADD_RMS_NORM, RMS_NORM
    from effopt.backends.triton.rope import ROPE
    from effopt.backends.triton.selective_scan import SELECTIVE_SCAN
    from effopt.backends.triton.stream_k_attention import STREAM_K_ATTENTION
    from effopt.backends.triton.unified_max_attention import UNIFIED_MAX_ATTENTION

    ROW_KERNELS = (RMS_NORM, ADD_RMS_NORM, LAYER_NORM, ADD_LAYER_NORM, GLU, ROPE)
    DECODE = (DECODE_ATTENTION, STREAM_K_ATTENTION, UNIFIED_MAX_ATTENTION, PAGED_ATTENTION)
    ATTENTION = (FLASH_ATTENTION, *DECODE, ATTENTION_LSE, BLOCK_SPARSE_ATTENTION)
    RECURRENT = (SELECTIVE_SCAN, LINEAR_ATTENTION)
    LOWERINGS = (*ROW_KERNELS, QUANTIZED_LINEAR, INT8_LINEAR, *ATTENTION, *RECURRENT)
