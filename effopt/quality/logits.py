"""What logits say of the tokens that came: sums over the rows of one batch, in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from effopt.errors import QualityError


class RowSums(NamedTuple):
    """Sums over the counted tokens of each row, float64 [rows], on the CPU."""

    nats: Tensor
    """Negative log probability of the tokens that came."""
    agreed: Tensor | None
    """Tokens for which model and reference have the same first choice; None without a reference."""
    kl: Tensor | None
    """Kullback-Leibler divergence of the model from the reference, in nats."""


def logits_of(kind: str, result: Any, tokens: Tensor) -> Tensor:
    """The logits [rows, t, vocabulary] of what a model gave for tokens [rows, t].

    Raises:
        QualityError: there are none, or of another shape; names `kind` as what gave them.
    """
    logits = result if isinstance(result, Tensor) else getattr(result, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != tokens.shape:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(result).__name__
        raise QualityError(
            f"the {kind} gave {got} for tokens {list(tokens.shape)}: expected logits [rows, t, v]"
        )
    return logits


def row_sums(logits: Tensor, wanted: Tensor | None, targets: Tensor, counted: Tensor) -> RowSums:
    """Sums of the counted positions; NaN where the logits are.

    Args:
        logits: [rows, t, vocabulary], floating.
        wanted: those of the reference, or None.
        targets: int64 [rows, t], the token that came after each position.
        counted: bool [rows, t].
    """
    log_p = logits.float().log_softmax(-1)
    nats = _summed(-log_p.gather(-1, targets[..., None].to(logits.device)).squeeze(-1), counted)
    if wanted is None:
        return RowSums(nats, None, None)
    log_q = wanted.float().log_softmax(-1)
    agreed = _summed(log_p.argmax(-1) == log_q.argmax(-1), counted)
    q = log_q.exp()
    return RowSums(nats, agreed, _summed(torch.where(q > 0, q * (log_q - log_p), 0.0).sum(-1), counted))


def _summed(values: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, values.cpu().double(), 0.0).sum(-1)
