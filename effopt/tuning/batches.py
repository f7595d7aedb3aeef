"""What a model is measured on: batches of token ids, or texts, in two splits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effopt.errors import QualityError
from effopt.model_graphs import as_call
from effopt.quality.texts import Text, Tier, checked_texts, windows

TEXTS = Tier(context=256, stride=256, rows=4, texts=12, tokens_per_text=257)
"""Of texts, unless another tier is given: twelve windows of 256 tokens, four at a time."""


@dataclass(frozen=True)
class Batch:
    """One call, and what came after each of its tokens."""

    call: Any
    """See `effopt.model_graphs.as_call`."""
    tokens: Tensor
    """int64 [rows, t]."""
    targets: Tensor
    """int64 [rows, t], the next token; anything where `counted` is False."""
    counted: Tensor
    """bool [rows, t]."""
    byte_count: int
    """Of the counted targets."""


def split(
    batches: Iterable[Any], tier: Tier = TEXTS, device: torch.device | None = None
) -> tuple[list[Batch], list[Batch]]:
    """Calibration and validation: every third batch is for validation, the last one if there are two.

    A single batch is split so by rows, texts by texts.

    Args:
        batches: calls whose first int64 tensor `[rows, t]`, or `input_ids`, is token ids; a mask
            `attention_mask` `[rows, t]` says which count. Or `Text` objects, read as `tier` says.
        tier: for texts.
        device: where the tokens of texts go; calls stay where they are.

    Raises:
        QualityError: nothing to split, too short, or not token ids.
    """
    given: list[Any] = [batches] if isinstance(batches, (Tensor, Mapping)) else list(batches)
    if not given:
        raise QualityError("there are no batches to tune on: give two at least, or one of two rows")
    if all(isinstance(batch, Text) for batch in given):
        texts = checked_texts(given, tier)
        if len(texts) < 2:
            raise QualityError("one text cannot be split into calibration and validation: give two at least")
        seen, unseen = _thirds(texts)
        return _of_texts(seen, tier, device), _of_texts(unseen, tier, device)
    if any(isinstance(batch, Text) for batch in given):
        raise QualityError("the batches are partly texts and partly calls: give one or the other")
    if len(given) == 1:
        given = _rows(given[0])
    seen, unseen = _thirds(given)
    return [_of_call(batch) for batch in seen], [_of_call(batch) for batch in unseen]


def _thirds(members: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    if len(members) == 2:
        return [members[0]], [members[1]]
    return [m for i, m in enumerate(members) if i % 3 != 2], list(members[2::3])


def _rows(batch: Any) -> list[Any]:
    """One batch as two, by rows."""
    rows = len(_tokens(batch))
    if rows < 2:
        raise QualityError(
            f"one batch of {rows} row cannot be split into calibration and validation: give more batches"
        )
    parts = _thirds(range(rows))
    return [_taken(batch, torch.tensor(part), rows) for part in parts]


def _taken(value: Any, rows: Tensor, count: int) -> Any:
    if isinstance(value, Mapping):
        return {name: _taken(v, rows, count) for name, v in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_taken(v, rows, count) for v in value)
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 0 or len(value) != count:
        raise QualityError(
            f"one batch is split by rows, and it holds a tensor {list(value.shape)} without its {count} rows:"
            " give two batches at least"
        )
    return value[rows.to(value.device)]


def _tokens(batch: Any) -> Tensor:
    args, kwargs = as_call(batch)
    given = [kwargs["input_ids"]] if "input_ids" in kwargs else [*args, *kwargs.values()]
    found = next(
        (v for v in given if isinstance(v, Tensor) and v.dtype == torch.int64 and v.dim() == 2), None
    )
    if found is None:
        got = ", ".join(
            f"{list(v.shape)} {v.dtype}" if isinstance(v, Tensor) else type(v).__name__ for v in given
        )
        raise QualityError(f"a batch holds no token ids, int64 [rows, t]: got {got or 'nothing'}")
    if found.shape[0] < 1 or found.shape[1] < 2:
        raise QualityError(
            f"a batch of token ids {list(found.shape)} predicts nothing: it takes a row of two at least"
        )
    return found


def _of_call(batch: Any) -> Batch:
    tokens = _tokens(batch)
    targets = tokens.roll(-1, 1)
    counted = torch.ones_like(tokens, dtype=torch.bool)
    mask = as_call(batch)[1].get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == tokens.shape:
        counted = mask.bool() & mask.bool().roll(-1, 1)
    counted[:, -1] = False
    if not bool(counted.any()):
        raise QualityError("the attention mask of a batch leaves no token to predict")
    return Batch(batch, tokens, targets, counted.cpu(), int(counted.sum()))


def _of_texts(texts: Sequence[Text], tier: Tier, device: torch.device | None) -> list[Batch]:
    total = sum(len(t.tokens) - 1 if t.token_bytes is None else int(t.token_bytes[1:].sum()) for t in texts)
    made = []
    for number, (tokens, counted, _) in enumerate(windows(texts, tier)):
        given = tokens[:, :-1].contiguous().to(device)
        # Sums are over all batches of a split: the bytes of all texts are with the first.
        made.append(Batch(given, given, tokens[:, 1:], counted, total if number == 0 else 0))
    return made
