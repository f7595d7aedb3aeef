"""Rows of which each sees as many keys as any other, one key further on: one call of PyTorch's CPU kernel.

Some rows and the keys that they reach, a step, stand for a head, and the keys of neighbouring steps overlap
in memory: nothing is copied. So the gradients of a key are a sum over the steps that reach it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effopt.backends.attention_parts import flash, flash_backward
from effopt.graph.ops.attention import open_keys

STEP = 32
"""Rows of a step: those that PyTorch's kernel gives to one thread."""


def band(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Results and log-sum-exp of rows, a multiple of `STEP`.

    Args:
        q: `[b, h, n, d]`.
        k: keys from the first of the first row to the last of the last, `[b, hkv, n + width - 1, d]`.
        v: their values.
        scale: multiplies scores.
    """
    b, hkv, rows = k.shape[0], k.shape[1], q.shape[2]
    width = k.shape[2] - rows + 1
    out, lse = flash(
        *(_steps(q, hkv, STEP), _windows(k, width, STEP), _windows(v, width, STEP)),
        attn_mask=_mask(width, STEP, q, q.shape[1] // hkv),
        scale=scale,
    )
    return _rows(out, b, STEP), _rows(lse, b, STEP)


def band_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; `out` and `lse` are those of all that a row sees."""
    rows, width = q.shape[2], k.shape[2] - q.shape[2] + 1
    # Long steps: each makes gradients of its own for all keys that it reaches, and these are added up.
    long = max(STEP, 1 << (width // 4).bit_length())
    done = rows // long * long
    of_q, of_k, of_v = (torch.zeros_like(x) for x in (q, k, v))
    for start, stop, step in ((0, done, long), (done, rows, STEP)):
        if start == stop:
            continue
        mine, keys = slice(start, stop), slice(start, stop + width - 1)
        hkv = k.shape[1]
        steps = [_steps(x[:, :, mine], hkv, step) for x in (grad, q, out, lse)]
        windows = [_windows(x[:, :, keys], width, step) for x in (k, v)]
        mask = _mask(width, step, q, q.shape[1] // hkv)
        given = (*steps[:2], *windows, *steps[2:])
        made = flash_backward(*given, 0.0, False, attn_mask=mask, scale=scale)
        of_q[:, :, mine] = _rows(made[0], q.shape[0], step)
        _add(of_k[:, :, keys], made[1], step)
        _add(of_v[:, :, keys], made[2], step)
    return of_q, of_k, of_v


def _steps(x: Tensor, hkv: int, step: int) -> Tensor:
    """From `[b, h, n, ...]` to `[b * hkv, steps, heads of a KV head * step, ...]`."""
    return x.unflatten(1, (hkv, -1)).unflatten(3, (-1, step)).transpose(2, 3).flatten(3, 4).flatten(0, 1)


def _rows(x: Tensor, b: int, step: int) -> Tensor:
    """The way back."""
    x = x.unflatten(2, (-1, step)).unflatten(0, (b, -1))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _windows(x: Tensor, width: int, step: int) -> Tensor:
    """The keys of each step, `[b * hkv, steps, width + step - 1, d]`, which overlap in memory."""
    return x.flatten(0, 1).unfold(1, width + step - 1, step).transpose(-1, -2)


def _add(into: Tensor, windows: Tensor, step: int) -> None:
    """Add windows to the keys that they are of, `[b, hkv, n, d]`."""
    windows = windows.unflatten(0, into.shape[:2])
    steps, size = windows.shape[2:4]
    for start in range(0, size, step):
        part = windows[:, :, :, start : start + step]
        n = part.shape[3]
        keys = into[:, :, start : start + (steps - 1) * step + n]
        keys.unfold(2, n, step).transpose(-1, -2).add_(part)


def _mask(width: int, step: int, like: Tensor, heads: int) -> Tensor:
    """0 and -inf, `[rows of all heads of a KV head, keys]`."""
    seen = open_keys(step, width + step - 1, like.device, 0, width - 1)
    assert seen is not None
    return torch.zeros_like(seen, dtype=like.dtype).masked_fill(~seen, -math.inf).repeat(heads, 1)
