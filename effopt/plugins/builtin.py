"""The passes, ops and lowerings that come with effopt, registered as any plugin would."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from effopt.backends.attention_parts import LOWERINGS as ATTENTION_PARTS
from effopt.backends.base import Lowering
from effopt.backends.block_attention import LOWERINGS as BLOCK_ATTENTION
from effopt.backends.block_sparse import LOWERINGS as BLOCK_SPARSE
from effopt.backends.chunked_linear_attention import LOWERINGS as CHUNKED_LINEAR
from effopt.backends.chunked_scan import LOWERINGS as CHUNKED_SCAN
from effopt.backends.flex_attention import LOWERINGS as FLEX
from effopt.backends.int8_products import LOWERINGS as INT8_PRODUCTS
from effopt.backends.native import LOWERINGS as NATIVE
from effopt.backends.paged_gathered import LOWERINGS as PAGED_GATHERED
from effopt.backends.paged_requests import LOWERINGS as PAGED_REQUESTS
from effopt.backends.quantized import LOWERINGS as QUANTIZED
from effopt.backends.reference import reference_lowering
from effopt.graph.ops import OPS
from effopt.graph.ops.base import Op
from effopt.passes.base import Pass
from effopt.plugins.hookspec import hookimpl

FAMILIES = ("canonicalize", "cleanup", "layers", "kv", "attention", "quantization", "fusion")


@hookimpl
def effopt_passes() -> Sequence[type[Pass]]:
    """Every family's `PASSES`, in pipeline order."""
    modules = (importlib.import_module(f"effopt.passes.{family}") for family in FAMILIES)
    return tuple(pass_ for module in modules for pass_ in module.PASSES)


@hookimpl
def effopt_ops() -> Sequence[Op]:
    """The canonical ops."""
    return OPS


@hookimpl
def effopt_lowerings() -> Sequence[Lowering]:
    """Triton kernels, library kernels, and the reference of every op."""
    from effopt.backends.triton import LOWERINGS as TRITON

    attention = (*BLOCK_ATTENTION, *BLOCK_SPARSE, *NATIVE, *FLEX, *ATTENTION_PARTS)
    paged = (*PAGED_REQUESTS, *PAGED_GATHERED)
    native = (*attention, *paged, *QUANTIZED, *INT8_PRODUCTS, *CHUNKED_SCAN, *CHUNKED_LINEAR)
    return (*TRITON, *native, *(reference_lowering(op) for op in OPS))
