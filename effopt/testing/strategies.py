"""Hypothesis strategies: small graphs in the spellings of models, and operands.

Graphs are lists of blocks from `[b, t, d]` to `[b, t, d]`, so that a failing one shrinks to one block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

B, T, D, HEADS = 2, 5, 8, 2


@dataclass(frozen=True)
class Block:
    """One step of a program. `arguments` are numbers drawn for it; `back` counts earlier values back."""

    name: str
    arguments: tuple[float, ...] = ()
    back: int = 1

    def __repr__(self) -> str:
        return f"{self.name}{self.arguments or ''}" + (f"<-{self.back}" if self.back != 1 else "")


@dataclass(frozen=True)
class Program:
    """Blocks one after the other. Call it with `x`, `weight` `[d, d]`, `gain` `[d]` and `keep` `[t, t]`."""

    blocks: tuple[Block, ...]

    def __call__(self, x: Tensor, weight: Tensor, gain: Tensor, keep: Tensor) -> Tensor:
        values = [x]
        for block in self.blocks:
            other = values[-min(block.back, len(values))]
            values.append(BLOCKS[block.name](values[-1], other, weight, gain, keep, *block.arguments))
        return values[-1]

    @staticmethod
    def inputs(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """Operands of every program; a few keys are masked, and no row is masked entirely."""
        draw = torch.Generator().manual_seed(seed)
        keep = torch.rand(T, T, generator=draw) > 0.3
        keep[:, 0] = True
        numbers = (
            torch.randn(*s, generator=draw, dtype=torch.float64).to(dtype) for s in ((B, T, D), (D, D), (D,))
        )
        return (*numbers, keep)


def _attention(
    x: Tensor, other: Tensor, w: Tensor, g: Tensor, keep: Tensor, spelling: float, scale: float
) -> Tensor:
    q, k = (v.view(B, T, HEADS, D // HEADS).transpose(1, 2) for v in (F.linear(x, w), F.linear(other, w)))
    if spelling == 0:
        scores = torch.where(keep, q @ k.transpose(-2, -1) * scale, float("-inf"))
    elif spelling == 1:
        scores = q @ k.transpose(-2, -1) / (1 / scale) + torch.zeros(T, T).masked_fill(~keep, -1e9)
    else:
        causal = torch.ones(T, T, dtype=torch.bool).tril()
        scores = ((q * scale) @ k.transpose(-2, -1)).masked_fill(~causal, float("-inf"))
    out = scores.softmax(-1) @ k
    return out.transpose(1, 2).reshape(B, T, D)


def _rms_norm(x: Tensor, _: Tensor, __: Tensor, gain: Tensor, ___: Tensor, dim: float, eps: float) -> Tensor:
    return gain * (x * torch.rsqrt(x.pow(2).mean(int(dim), keepdim=True) + eps))


def _layer_norm(x: Tensor, _: Tensor, __: Tensor, gain: Tensor, ___: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + eps) * gain


def _rope(x: Tensor, *_: Any) -> Tensor:
    angle = torch.arange(T).float()[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])[None, :]
    angle = torch.cat((angle, angle), -1).to(x.dtype)
    half = torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1)
    return x * angle.cos() + half * angle.sin()


BLOCKS: Mapping[str, Callable[..., Tensor]] = {
    "relu": lambda x, *_: x.relu(),
    "tanh": lambda x, *_: x.tanh(),
    "copy": lambda x, *_: x.clone().to(x.dtype).contiguous(),
    "turn twice": lambda x, *_: x.transpose(1, 2).transpose(1, 2),
    "add": lambda x, other, *_: x + other,
    "subtract": lambda x, other, *_: x - other,
    "scale": lambda x, o, w, g, k, by: x * by,
    "softmax": lambda x, o, w, g, k, dim: x.softmax(int(dim)),
    "linear": lambda x, o, w, *_: F.linear(x, w),
    "gated": lambda x, other, w, *_: F.silu(F.linear(x, w)) * other,
    "gelu": lambda x, *_: 0.5 * x * (1.0 + torch.erf(x / 1.4142135623730951)),
    "rms norm": _rms_norm,
    "layer norm": _layer_norm,
    "rope": _rope,
    "attention": _attention,
}

_ARGUMENTS: Mapping[str, Sequence[st.SearchStrategy[float]]] = {
    "scale": (st.sampled_from([2.0, 0.125, 1.0, 0.0, -1.0]),),
    "softmax": (st.sampled_from([-1.0, 1.0, 2.0, 0.0]),),
    "rms norm": (st.sampled_from([-1.0, 2.0, 1.0]), st.sampled_from([1e-6, 1e-3, 0.0])),
    "layer norm": (st.sampled_from([1e-5, 1e-3]),),
    "attention": (st.sampled_from([0.0, 1.0, 2.0]), st.sampled_from([0.5, 1.0, 0.25])),
}


def _block(name: str) -> st.SearchStrategy[Block]:
    arguments = st.tuples(*_ARGUMENTS.get(name, ()))
    return st.builds(Block, st.just(name), arguments, st.integers(1, 3))


def graphs(max_blocks: int = 5) -> st.SearchStrategy[Program]:
    """Programs of one to `max_blocks` blocks. Shrinks to fewer blocks, and to the first of `BLOCKS`."""
    block = st.sampled_from(list(BLOCKS)).flatmap(_block)
    return st.lists(block, min_size=1, max_size=max_blocks).map(lambda blocks: Program(tuple(blocks)))


def operands(
    meta: Tensor, elements: Sequence[float] = (0.0, 1.0, -1.0, 0.5, 1e-3, 1e3)
) -> st.SearchStrategy[Tensor]:
    """Tensors of the shape, dtype and strides of `meta` (a fake or real tensor).

    Each is ordinary numbers at one scale, with some elements replaced by one of `elements`. Shrinks to
    seed 0 and nothing replaced.
    """
    from effopt.graph.ops.base import hint
    from effopt.graph.sampling import with_strides

    sizes = [hint(s) for s in meta.shape]
    strides = [hint(s) for s in meta.stride()]
    compact = [1 if stride == 0 else size for size, stride in zip(sizes, strides, strict=True)]

    def fill(seed: int, share: float, special: float, scale: float) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        if meta.dtype == torch.bool:
            drawn = torch.rand(compact, generator=draw) > share
        elif not meta.dtype.is_floating_point:
            drawn = torch.randint(0, 4, compact, generator=draw).to(meta.dtype)
        else:
            drawn = torch.randn(compact, generator=draw, dtype=torch.float64) * scale
            drawn = drawn.masked_fill(torch.rand(compact, generator=draw) < share, special).to(meta.dtype)
        return with_strides(drawn.to(meta.device), sizes, strides)

    shares, scales = st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([1.0, 1e-3, 10.0])
    return st.builds(fill, st.integers(0, 99), shares, st.sampled_from(list(elements)), scales)
