"""The flash kernel where its log-sum-exp is wanted too: parts of one attention, to be joined.

The kernel of `flash_attention.py` writes the log-sum-exp of each row in any case; nothing is added to it.

Source: Dao et al. 2022, arXiv:2205.14135, algorithm 1; Juravsky et al. 2024, arXiv:2402.05099, section 3.1.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from effopt.backends.base import Lowering, by_operands
from effopt.backends.triton.attention_refusals import prepare, supports
from effopt.backends.triton.attention_tiles import attention_cost, row_tiles
from effopt.backends.triton.flash_attention import _flash_attention
from effopt.graph import ops
from effopt.graph.ops.base import Operands
from effopt.target import Target

_ABSENT = {
    "fill": None,
    "dropout_p": 0.0,
    "zero_masked_rows": True,
    "rows_see_key": False,
    "anchors": None,
    "prefix": None,
}
"""What `attention` takes besides: rows without keys give 0, and nothing is dropped."""


@by_operands(ops.attention_lse)
def flash_attention_lse(operands: Operands) -> tuple[Tensor, Tensor]:
    """`ops.attention_lse` by one kernel; arguments as there, of any strides, up to float32."""
    out, lse, _, _ = _flash_attention(*prepare({**operands, **_ABSENT}), 0.0, None)
    return out, lse


def _supports(target: Target, operands: Operands) -> str | None:
    return supports(target, {**operands, **_ABSENT})


_kernel_cost = attention_cost(row_tiles, launches=1)


def _cost(target: Target, operands: Operands, result: Any) -> float:
    """As for `attention`: the log-sum-exp is small."""
    return float(_kernel_cost(target, {**operands, **_ABSENT}, result))


ATTENTION_LSE = Lowering(
    ops.attention_lse, "triton", flash_attention_lse, _supports, _cost, differentiable=False
)
