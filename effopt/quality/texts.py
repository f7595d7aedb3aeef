"""What a language model is judged on: texts, probes of recall, and how much of them a tier takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from effopt.errors import QualityError


@dataclass(frozen=True)
class Text:
    """A text to predict. Its first token is given, all others are predicted."""

    name: str
    tokens: Tensor
    """int64 [n], n >= 2."""
    token_bytes: Tensor | None = None
    """int64 [n], the bytes that each token stands for; None: one each, as in a byte-level model."""


@dataclass(frozen=True)
class Probe:
    """A sequence that can be continued only by recalling something `distance` tokens back."""

    tokens: Tensor
    """int64 [n]; all probes of one call have the same length."""
    answer: tuple[int, int]
    """Start and end of the tokens that must all be the first choice."""
    distance: int


@dataclass(frozen=True)
class Tier:
    """How much is measured. Text is read in windows of [rows, context], so a model compiles once for it."""

    context: int = 1024
    """Tokens a window; at most the context that the model was trained with."""
    stride: int = 512
    """Tokens from one window to the next: a token has `context - stride` before it, or all there are."""
    rows: int = 8
    texts: int | None = None
    """The first so many texts; None: all."""
    tokens_per_text: int | None = None
    """The first so many of each text; None: all."""
    probes_per_distance: int | None = None
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.stride <= self.context:
            raise QualityError(f"stride {self.stride}: expected 1 to the context, {self.context}")
        for name in ("rows", "texts", "tokens_per_text", "probes_per_distance", "resamples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise QualityError(f"{name} is {value}: expected at least 1")


QUICK = Tier(texts=8, tokens_per_text=1025, probes_per_distance=8, resamples=500)
"""For tests: some 32,000 tokens, seconds for a model of ten million parameters on two cores."""
FULL = Tier()
"""For benchmarks: everything that was given."""


def checked_texts(texts: Sequence[Text], tier: Tier) -> list[Text]:
    """The texts that the tier asks for, cut to its length."""
    if not texts:
        raise QualityError("there are no texts to evaluate on")
    chosen = [
        dataclasses.replace(
            text,
            tokens=text.tokens[: tier.tokens_per_text],
            token_bytes=None if text.token_bytes is None else text.token_bytes[: tier.tokens_per_text],
        )
        for text in texts[: tier.texts]
    ]
    for text in chosen:
        if text.tokens.dim() != 1 or text.tokens.dtype != torch.int64:
            shape = list(text.tokens.shape)
            raise QualityError(f"text {text.name!r}: expected int64 [n], got {text.tokens.dtype} {shape}")
        if len(text.tokens) < 2:
            raise QualityError(
                f"text {text.name!r} has {len(text.tokens)} tokens: two are the least to predict one"
            )
        if text.token_bytes is not None and text.token_bytes.shape != text.tokens.shape:
            raise QualityError(f"text {text.name!r}: token_bytes must have one entry for each token")
        if text.token_bytes is not None and int(text.token_bytes[1:].sum()) < 1:
            raise QualityError(f"text {text.name!r}: its tokens stand for no bytes")
    if len({text.name for text in chosen}) < len(chosen):
        raise QualityError("two texts have the same name: the bootstrap would count them as one")
    return chosen


def checked_probes(probes: Sequence[Probe], tier: Tier) -> list[Probe]:
    """The probes that the tier asks for."""
    chosen: list[Probe] = []
    for probe in probes:
        if sum(c.distance == probe.distance for c in chosen) == tier.probes_per_distance:
            continue
        start, end = probe.answer
        if not 0 < start < end <= len(probe.tokens):
            raise QualityError(f"a probe of {len(probe.tokens)} tokens has no answer at {start} to {end}")
        if len(probe.tokens) != len(probes[0].tokens):
            raise QualityError("probes have different lengths: pad them at the end, which nothing reads")
        chosen.append(probe)
    return chosen


def windows(texts: Sequence[Text], tier: Tier) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of (tokens [rows, context + 1], counted [rows, context], text of each row), end-padded."""
    rows = []
    for index, text in enumerate(texts):
        behind = tier.context - tier.stride
        for start in range(0, max(1, len(text.tokens) - 1 - behind), tier.stride):
            window = text.tokens[start : start + tier.context + 1]
            counted = torch.zeros(tier.context, dtype=torch.bool)
            counted[behind if start else 0 : len(window) - 1] = True
            rows.append((F.pad(window, (0, tier.context + 1 - len(window))), counted, index))
    for first in range(0, len(rows), tier.rows):
        part = rows[first : first + tier.rows]
        part += [(torch.zeros_like(part[0][0]), torch.zeros_like(part[0][1]), 0)] * (tier.rows - len(part))
        yield (
            torch.stack([row[0] for row in part]),
            torch.stack([row[1] for row in part]),
            torch.tensor([row[2] for row in part]),
        )
