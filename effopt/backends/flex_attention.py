"""FlexAttention: PyTorch's template with the mask, the soft-cap and the bias inlined, on a CPU.

The higher-order op is called itself, with everything that its functions read as operands: Inductor traces
the lowered graph without Dynamo, which would have lifted them out of closures. Which blocks of keys are
read is computed in the graph, from the ends of bands, the least and the greatest id of a block and a mask
reduced by blocks: O((t / 128) (s / 128)) work, but for the mask. A block that is taken for open is only
slower, for inside it the mask decides.

What was checked on torch 2.13: float32, bfloat16 and float16; a row that sees no key gives 0. The template
has no backward pass, no log-sum-exp (so no sinks) and no float64. Its other template, for one query, reads
memory that was never written where no key is open, and is not used.

Source: Dong et al. 2024, arXiv:2412.05496 (score_mod, mask_mod and the block mask).
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.backends.base import Lowering, by_operands, inductor_settings
from effopt.backends.native import restore_blind_rows
from effopt.graph import ops
from effopt.graph.ops.attention import band_share, open_keys, score_flops
from effopt.graph.ops.base import Operands, hint
from effopt.target import Target

_BLOCK = 128
"""Queries, and keys, of a block: the library's own choice."""
_UNREACHED = -1e9
"""No score comes near a fill at or below this: what is masked takes no weight from what is not."""
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SLOWER = 3.0
"""How much longer than the library's causal kernel a product takes: 2.6 to 2.8 times at 2k and 4k tokens
(`benchmarks/attention.py --flex`). And each call is a file that the C++ compiler takes seconds for."""
_CALL_S = 1e-4
"""Seconds of a call beside its arithmetic: the block mask, and buffers for each thread."""
_GUESSED_SHARE = 0.5
"""Share of keys that is guessed to be open where values tell: a row of two documents."""

_flex = torch.ops.higher_order.flex_attention


@dataclass(frozen=True)
class _Seen:
    """Which keys are seen, as the op says it: for single pairs, and for blocks of them."""

    t: Any
    s: Any
    device: torch.device
    low: Any
    high: Any
    anchors: Any
    prefix: Any
    ids: Tensor | None
    """`[b or 1, s + t]`: of keys, then of queries; one tensor, for two views of one are read as the first."""
    mask: Tensor | None
    """`[b or 1, h or 1, t or 1, s or 1]`."""

    def operands(self) -> tuple[Tensor, ...]:
        """What `open` reads besides numbers."""
        return tuple(x for x in (self.ids, self.mask) if x is not None)

    def open(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor, *given: Tensor) -> Tensor:
        """Whether query q sees key k: `mask_mod`."""
        low, high, anchors, prefix, s = self.low, self.high, self.anchors, self.prefix, self.s
        seen = k >= 0
        if low is not None:
            seen = seen & (k - q >= low if anchors is None else (k - q >= low) | (k < anchors))
        if high is not None:
            seen = seen & (k - q <= high if prefix is None else (k - q <= high) | (k < prefix))
        if self.ids is not None:
            ids = given[0]
            entry = b if ids.shape[0] > 1 else torch.zeros_like(b)
            same = ids[entry, k] == ids[entry, s + q]
            seen = seen & (same if anchors is None else same | (k < anchors))
        return seen & _at(given[-1], b, h, q, k) if self.mask is not None else seen

    def blocks(self) -> tuple[Tensor, Tensor]:
        """Blocks that may be open somewhere, and those that are open everywhere; bool `[b, h, nq, nk]`."""
        rows, keys = _edges(self.t, self.device), _edges(self.s, self.device)
        (first_row, last_row), (first, last) = (x.unsqueeze(-1) for x in rows), keys
        least, most = first - last_row, last - first_row
        somewhere, everywhere = least <= most, least <= most
        for near, far, bound, always in (
            (most, least, self.low, self.anchors),
            (-least, -most, None if self.high is None else -self.high, self.prefix),
        ):
            if bound is not None:
                somewhere = somewhere & _or_first(near >= bound, first, always)
                everywhere = everywhere & _or_first(far >= bound, last, always)
        somewhere, everywhere = somewhere[None, None], everywhere[None, None]
        if self.ids is not None:
            key_ids, query_ids = self.ids[:, : self.s], self.ids[:, self.s :]
            (k0, k1), (q0, q1) = _range(key_ids, -2), _range(query_ids, -1)
            somewhere = somewhere & _or_first((q0 <= k1) & (k0 <= q1), first, self.anchors)
            everywhere = everywhere & _or_first((q0 == k1) & (k0 == q1), last, self.anchors)
        if self.mask is not None:
            tiles = _tiles(_tiles(self.mask, -1), -3)
            somewhere, everywhere = somewhere & tiles.any(-1).any(-2), everywhere & tiles.all(-1).all(-2)
        return somewhere, everywhere


def _edges(n: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first and the last index of each block of n."""
    first = torch.arange(0, n, _BLOCK, device=device)
    return first, (first + (_BLOCK - 1)).clamp(max=n - 1)


def _or_first(condition: Tensor, key: Tensor, always: Any) -> Tensor:
    return condition if always is None else condition | (key < always)


def _tiles(x: Tensor, dim: int) -> Tensor:
    """`x` with one dimension cut into blocks, the last filled up by repetition; size 1 stays."""
    n = x.shape[dim]
    if n == 1:
        return x.unsqueeze(dim)
    blocks = (n + _BLOCK - 1) // _BLOCK
    places = torch.arange(blocks * _BLOCK, device=x.device).clamp(max=n - 1)
    return x.index_select(dim, places).unflatten(dim, (blocks, _BLOCK))


def _range(ids: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The least and the greatest id of each block, `[b, 1, nq, 1]` or `[b, 1, 1, nk]`."""
    tiles = _tiles(ids, -1)
    return tiles.amin(-1).unsqueeze(1).unsqueeze(dim), tiles.amax(-1).unsqueeze(1).unsqueeze(dim)


def _at(x: Tensor, *places: Tensor) -> Tensor:
    """The element of a tensor of 4 dimensions that broadcasts."""
    index = tuple(p if n != 1 else torch.zeros_like(p) for p, n in zip(places, x.shape, strict=True))
    return x[index]


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row of blocks has, and which: those first, in order."""
    order = blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


def _four_dimensional(x: Tensor) -> Tensor:
    return x[(None,) * (4 - x.dim())]


def _joined(query_ids: Tensor, key_ids: Tensor) -> Tensor:
    query_ids, key_ids = (x if x.dim() == 2 else x.unsqueeze(0) for x in (query_ids, key_ids))
    b = max(query_ids.shape[0], key_ids.shape[0], key=hint)
    wide = torch.promote_types(query_ids.dtype, key_ids.dtype)
    return torch.cat([x.to(wide).expand(b, -1) for x in (key_ids, query_ids)], -1)


@torch.library.custom_op("effopt::stored", mutates_args=())
def _stored(x: Tensor) -> Tensor:
    """A copy in memory, for what the graph computes.

    Of that, Inductor 2.13's template finds only the expression, and then no kernel: `NoValidChoicesError`.
    """
    return x.clone(memory_format=torch.contiguous_format)


@_stored.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


# The template takes no epilogue. Inductor 2.13 fuses what reads its result into it all the same, and fails.
@inductor_settings(epilogue_fusion=False)
@by_operands(ops.attention)
def flex_attention(operands: Operands) -> Tensor:
    """`ops.attention` through `flex_attention`; arguments as there."""
    from torch.nn.attention.flex_attention import BlockMask  # imports all of Inductor

    query, key, value, bias, softcap = (operands[n] for n in ("query", "key", "value", "bias", "softcap"))
    seen = _seen(operands)
    added = () if bias is None else (_four_dimensional(bias),)

    def score(x: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, *given: Tensor) -> Tensor:
        x = softcap * torch.tanh(x / softcap) if softcap else x
        return x + _at(given[0], b, h, q, k) if given else x

    somewhere, everywhere = seen.blocks()
    partly, whole = _listed(somewhere & ~everywhere), _listed(somewhere & everywhere)
    blocks = BlockMask.from_kv_blocks(
        *(*partly, *whole), _BLOCK, seen.open, seq_lengths=(seen.t, seen.s), compute_q_blocks=False
    )
    settings = {"BACKEND": "AUTO", "OUTPUT_LOGSUMEXP": False, "OUTPUT_MAX": False}
    given = (query, key, value, score, blocks.as_tuple(), operands["scale"], settings)
    read = (tuple(map(_stored, added)), tuple(map(_stored, seen.operands())))
    out = _flex(*given, *read)[0].contiguous()
    fill, mask = operands["fill"], operands["mask"]
    keeps_zero = operands["zero_masked_rows"] and (fill is None or not math.isfinite(fill))
    if operands["rows_see_key"] or keeps_zero:
        return out
    ids = (operands["query_ids"], operands["key_ids"])
    bounds = (seen.low, seen.high, *ids, seen.anchors, seen.prefix)
    allowed = open_keys(seen.t, seen.s, seen.device, *bounds)
    both = allowed if mask is None else mask if allowed is None else mask & allowed
    return restore_blind_rows(out, value, bias, both, fill)


def _seen(operands: Operands) -> _Seen:
    """Which keys a call lets its queries see; `is_causal` is a bound like others."""
    query, key, mask, high, prefix = (operands[n] for n in ("query", "key", "mask", "high", "prefix"))
    if operands["is_causal"]:
        high, prefix = 0 if high is None else torch.sym_min(high, 0), None
    query_ids, key_ids = operands["query_ids"], operands["key_ids"]
    ids = None if query_ids is None or key_ids is None else _joined(query_ids, key_ids)
    dense = None if mask is None else _four_dimensional(mask)
    t, s, device = query.shape[-2], key.shape[-2], query.device
    return _Seen(t, s, device, operands["low"], high, operands["anchors"], prefix, ids, dense)


def _supports(target: Target, operands: Operands) -> str | None:
    if target.device_type != "cpu":
        return f"tried on a CPU only, this is {target.device_type}"
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX") or sys.platform == "darwin":
        return "FlexAttention's CPU kernel wants AVX2, and no macOS"
    if torch.__version__ < (2, 13):  # type: ignore[operator]  # compares as numbers
        return f"FlexAttention's CPU kernel was checked from torch 2.13 on, this is {torch.__version__}"
    return _refuses_call(operands) or _refuses_sizes(operands) or _refuses_fill(operands)


def _refuses_call(operands: Operands) -> str | None:
    query, bias = operands["query"], operands["bias"]
    if query.dtype not in _DTYPES or any(operands[n].dtype != query.dtype for n in ("key", "value")):
        return f"FlexAttention's CPU kernel takes one of {', '.join(map(str, _DTYPES))}"
    if bias is not None and bias.dtype == torch.float64:
        return "the bias is float64, and scores are float32"
    if operands["dropout_p"]:
        return "FlexAttention has no dropout"
    if operands["sinks"] is not None:
        return "sinks want the log-sum-exp, which FlexAttention does not give on a CPU"
    told = any(operands[name] is not None for name in ("low", "high", "query_ids"))
    if not (told or operands["is_causal"] or operands["softcap"]):
        return "no band, no ids and no soft-cap: nothing would be skipped that `sdpa` does not skip"
    return None


def _refuses_sizes(operands: Operands) -> str | None:
    query, key = operands["query"], operands["key"]
    if query.dim() != 4:
        return f"wants a batch and heads, 4 dimensions, got {query.dim()}"
    fixed = (*query.shape[1::2], *key.shape[1::2], *operands["value"].shape[1::2])
    if not all(isinstance(n, int) for n in fixed):
        return "the number of heads or their size is a symbol: FlexAttention wants both fixed"
    told = [operands[n] for n in ("low", "high", "anchors", "prefix", "query_ids", "mask", "bias")]
    read = any(isinstance(x, (Tensor, torch.SymInt)) for x in told)
    if read and not all(isinstance(n, int) for n in (*query.shape, *key.shape)):
        return "sizes that are symbols, and ids, a mask, a bias or bounds of sizes: Inductor finds no kernel"
    if not statically_known_true(query.shape[-2] > 1):
        return "one query, or perhaps one: FlexAttention's kernel for that is wrong where no key is open"
    if not all(statically_known_true(n > 0) for n in (*query.shape, *key.shape, *operands["value"].shape)):
        return "a size that is 0, or may be"
    return None


def _refuses_fill(operands: Operands) -> str | None:
    fill = operands["fill"]
    if fill is None or not math.isfinite(fill):
        return None
    if fill > _UNREACHED:
        return f"masked scores become {fill:g}, which is not far below every score; fill with -inf"
    if operands["bias"] is not None or operands["is_causal"]:
        beside = "a bias" if operands["bias"] is not None else "causal"
        return f"{beside}, and a mask that fills with {fill:g}; fill with -inf"
    return None


def _cost(target: Target, operands: Operands, result: Any) -> float:
    """The roofline of what is left in blocks, times what the template takes longer."""
    t, s = hint(operands["query"].shape[-2]), hint(operands["key"].shape[-2])
    share = min(1.0, band_share(operands) + min(_BLOCK, t - 1) / max(s, 1))
    share *= 1.0 if operands["query_ids"] is None else _GUESSED_SHARE
    work, moved = share * score_flops(operands), ops.attention.bytes_moved(operands, result)
    return _CALL_S + _SLOWER * max(moved / target.bytes_per_s, work / target.flops_per_s)


LOWERINGS: tuple[Lowering, ...] = (
    Lowering(ops.attention, "flex", flex_attention, _supports, _cost, differentiable=False),
)
