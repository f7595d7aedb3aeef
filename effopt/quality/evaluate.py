"""Measuring a language model: bits per byte, what it kept of a reference, recall by distance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from effopt.errors import QualityError
from effopt.quality.bootstrap import Interval, Ratio, bootstrap
from effopt.quality.logits import logits_of, row_sums
from effopt.quality.texts import QUICK, Probe, Text, Tier, checked_probes, checked_texts, windows

Model = Callable[[Tensor], Any]
"""Token ids, int64 [rows, t] -> logits [rows, t, vocabulary], or an object with `logits`. Must be causal."""


@dataclass(frozen=True)
class Counts:
    """Sums over the predicted tokens of one text."""

    name: str
    tokens: int
    bytes: int
    nats: float
    agreed: int | None
    """Tokens for which model and reference have the same first choice; None without a reference."""
    kl_nats: float | None
    """Kullback-Leibler divergence of the model from the reference, summed over tokens."""


@dataclass(frozen=True)
class Quality:
    """What `evaluate` found. Equal objects come from equal measurements."""

    bits_per_byte: Interval
    agreement: Interval | None
    """Share of tokens, 0 to 1, whose first choice is the reference's; None without a reference."""
    kl: Interval | None
    """Mean KL(reference || model) per token in nats; None without a reference."""
    recall: Mapping[int, Interval]
    """Distance in tokens -> share of probes, 0 to 1, whose whole answer is the first choice."""
    texts: tuple[Counts, ...] = field(repr=False)
    hits: Mapping[int, tuple[bool, ...]] = field(repr=False)
    tier: Tier = field(repr=False)

    @property
    def metrics(self) -> dict[str, Interval]:
        """All figures by name: bits_per_byte, agreement, kl, recall@256, ..."""
        named = {"bits_per_byte": self.bits_per_byte, "agreement": self.agreement, "kl": self.kl}
        found = {name: interval for name, interval in named.items() if interval is not None}
        return found | {f"recall@{distance}": interval for distance, interval in self.recall.items()}

    def difference(self, baseline: Quality) -> dict[str, Interval]:
        """This minus the baseline, by metric, paired: both are drawn again on the same texts and probes.

        An interval that excludes zero is a difference that other texts of this kind would show as well.

        Raises:
            QualityError: the two were not measured on the same texts, probes and tier.
        """
        mine, theirs = ([(c.name, c.tokens, c.bytes) for c in q.texts] for q in (self, baseline))
        probes = [{d: len(h) for d, h in q.hits.items()} for q in (self, baseline)]
        if mine != theirs or probes[0] != probes[1] or self.tier != baseline.tier:
            raise QualityError(
                "these were not measured on the same texts, probes and tier: evaluate both alike"
            )
        one, other = (q._ratios for q in (self, baseline))
        draw = self.tier.resamples, self.tier.seed
        return {name: bootstrap(one[name], *draw, minus=other[name]) for name in one if name in other}

    @property
    def _ratios(self) -> dict[str, Ratio]:
        return _text_ratios(self.texts) | {f"recall@{d}": Ratio.of(h) for d, h in self.hits.items()}

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the figures, then what they were made from."""
        return {
            "metrics": {name: dataclasses.asdict(interval) for name, interval in self.metrics.items()},
            "texts": [dataclasses.asdict(counts) for counts in self.texts],
            "hits": {str(distance): list(hits) for distance, hits in self.hits.items()},
            "tier": dataclasses.asdict(self.tier),
        }

    def __str__(self) -> str:
        return "\n".join(f"{name:>14}  {interval}" for name, interval in self.metrics.items())


@torch.no_grad()
def evaluate(
    model: Model,
    texts: Sequence[Text],
    *,
    reference: Model | None = None,
    probes: Sequence[Probe] = (),
    tier: Tier = QUICK,
) -> Quality:
    """Measure a model on texts, on probes, and against a reference.

    Raises:
        QualityError: no texts, a text or a probe that is too short or malformed, a model in training mode,
            logits of another shape than the tokens ask for, or a figure that is not finite; names which.
    """
    texts = checked_texts(texts, tier)
    probes = checked_probes(probes, tier)
    for kind, each in (("model", model), ("reference", reference)):
        if getattr(each, "training", False):
            raise QualityError(
                f"the {kind} is in training mode, where dropout makes chance of it: call .eval()"
            )
    counts = _count(model, reference, texts, tier)
    hits: dict[int, list[bool]] = {}
    for probe, hit in zip(probes, _hits(model, probes, tier), strict=True):
        hits.setdefault(probe.distance, []).append(hit)
    draw = tier.resamples, tier.seed
    figures = {name: bootstrap(ratio, *draw) for name, ratio in _text_ratios(counts).items()}
    return Quality(
        figures["bits_per_byte"],
        figures.get("agreement"),
        figures.get("kl"),
        {d: bootstrap(Ratio.of(h), *draw) for d, h in sorted(hits.items())},
        counts,
        {d: tuple(h) for d, h in sorted(hits.items())},
        tier,
    )


def _count(model: Model, reference: Model | None, texts: Sequence[Text], tier: Tier) -> tuple[Counts, ...]:
    """Sums by text, in float64."""
    nats, agreed, kl = (torch.zeros(len(texts), dtype=torch.float64) for _ in range(3))
    for tokens, counted, text in windows(texts, tier):
        given = tokens[:, :-1]
        wanted = None if reference is None else _logits("reference", reference, given)
        sums = row_sums(_logits("model", model, given), wanted, tokens[:, 1:], counted)
        nats.index_add_(0, text, sums.nats)
        if sums.agreed is not None and sums.kl is not None:
            agreed.index_add_(0, text, sums.agreed)
            kl.index_add_(0, text, sums.kl)
    for name, total in (("bits per byte", nats), ("KL divergence", kl)):
        for text_, value in zip(texts, total.tolist(), strict=True):
            if not math.isfinite(value):
                raise QualityError(
                    f"{name} of text {text_.name!r} is {value}: the model gave a probability of zero"
                )
    return tuple(
        Counts(
            text.name,
            len(text.tokens) - 1,
            len(text.tokens) - 1 if text.token_bytes is None else int(text.token_bytes[1:].sum()),
            float(nats[i]),
            int(agreed[i]) if reference is not None else None,
            float(kl[i]) if reference is not None else None,
        )
        for i, text in enumerate(texts)
    )


def _logits(kind: str, model: Model, tokens: Tensor) -> Tensor:
    logits = logits_of(kind, model(tokens), tokens)
    if bool(logits.isnan().any()):
        raise QualityError(f"the {kind} gave logits that are NaN")
    return logits


def _hits(model: Model, probes: Sequence[Probe], tier: Tier) -> Iterator[bool]:
    """Whether each probe is answered in full: greedy decoding stays on the answer as long as it is right."""
    for first in range(0, len(probes), tier.rows):
        part = list(probes[first : first + tier.rows])
        full = part + [part[-1]] * (tier.rows - len(part))
        tokens = torch.stack([probe.tokens for probe in full])
        chosen = _logits("model", model, tokens).argmax(-1).cpu()
        for row, probe in zip(chosen, part, strict=False):
            start, end = probe.answer
            yield bool((row[start - 1 : end - 1] == probe.tokens[start:end]).all())


def _text_ratios(counts: Sequence[Counts]) -> dict[str, Ratio]:
    tokens = [c.tokens for c in counts]
    found = {"bits_per_byte": Ratio.of([c.nats / math.log(2) for c in counts], [c.bytes for c in counts])}
    agreed = [c.agreed for c in counts if c.agreed is not None]
    kl = [c.kl_nats for c in counts if c.kl_nats is not None]
    if len(agreed) == len(kl) == len(counts):
        found |= {"agreement": Ratio.of(agreed, tokens), "kl": Ratio.of(kl, tokens)}
    return found
