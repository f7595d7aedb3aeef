"""Measures ways to compress a model side by side: quality, bytes, predicted operations, decoding speed.

Every way has a copy of the model of its own and is compiled as a user would compile it. The copies are timed
last, in interleaved rounds, so that a machine which slows down slows all of them down.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from effopt.bench import machine
from effopt.errors import QualityError
from effopt.plugins.manager import build_registry
from effopt.quality.texts import QUICK, Probe, Text, Tier
from effopt.tradeoff.contender import Contender, Decoding, Task, reader
from effopt.tradeoff.reference import Reference
from effopt.tradeoff.result import Tradeoff, Way


def measure(
    model: nn.Module,
    texts: Sequence[Text],
    ways: Sequence[Way],
    *,
    probes: Sequence[Probe] = (),
    tier: Tier = QUICK,
    decoding: Decoding | None = None,
    lowering: str = "auto",
    progress: Callable[[str], None] = lambda _: None,
) -> Tradeoff:
    """Compress `model` in every way, and in none, and measure.

    Args:
        model: in evaluation mode; it is copied, and left as it is. Decoding is timed if it is a model of
            `transformers` that generates.
        texts: to judge by. If a pass has to see data before it decides, it sees the last one, which is then
            not judged by.
        ways: what to compare; the uncompressed model is added in front.
        probes: of recall.
        tier: how much of the texts is read; windows are cut to the model's context.
        decoding: how speed is measured.
        lowering: as option `lowering` of a compile call.
        progress: told what begins.

    Raises:
        OptionError, PipelineError: passes that no compile call would take, before anything is measured.
        QualityError: a model in training mode, or no text to judge by. What a single way raises is in its
            row.
    """
    registry = build_registry()
    contenders = [Contender(way, registry, lowering) for way in (Way(), *ways)]
    task = _task(model, texts, probes, tier, decoding or Decoding(), lowering, contenders)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=sys.maxsize):
        for number, contender in enumerate(contenders, start=1):
            at = f"{number} of {len(contenders)}: {contender.way.name}"
            progress(f"{at}, compiling")
            tell = functools.partial(_tell, progress, at)
            contender.attempt(functools.partial(contender.measure, task, tell))
        _time(contenders, task.decoding, progress)
    return Tradeoff(tuple(c.row for c in contenders), _settings(task), machine())


def _tell(progress: Callable[[str], None], at: str, what: str) -> None:
    progress(f"{at}, {what}")


def _task(
    model: nn.Module,
    texts: Sequence[Text],
    probes: Sequence[Probe],
    tier: Tier,
    decoding: Decoding,
    lowering: str,
    contenders: Sequence[Contender],
) -> Task:
    if model.training:
        raise QualityError("the model is in training mode, where dropout makes chance of it: call .eval()")
    calibration = None
    if any(contender.scored for contender in contenders):
        texts, calibration = texts[:-1], texts[-1] if texts else None
    if not texts:
        seen = " but the one that passes decide from" if calibration is not None else ""
        raise QualityError(f"there are no texts to judge by{seen}: give more")
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if context is not None and context < tier.context:
        tier = dataclasses.replace(tier, context=context, stride=min(tier.stride, max(1, context // 2)))
    reference = Reference(reader(model.forward, model))
    return Task(model, reference, texts, probes, tier, decoding.within(context), calibration, lowering)


def _time(contenders: Sequence[Contender], how: Decoding, progress: Callable[[str], None]) -> None:
    """Rounds in turns; every round begins with another way."""
    for number in range(how.rounds):
        running = [contender for contender in contenders if contender.decoder is not None]
        if running:
            progress(f"timing, round {number + 1} of {how.rounds}")
        for offset in range(len(running)):
            contender = running[(number + offset) % len(running)]
            contender.attempt(functools.partial(contender.time_round, how.steps))


def _settings(task: Task) -> dict[str, Any]:
    parameters = list(task.model.parameters())
    return {
        "tier": dataclasses.asdict(task.tier),
        "decoding": dataclasses.asdict(task.decoding),
        "lowering": task.lowering,
        "texts": len(task.texts),
        "probes": len(task.probes),
        "parameters": sum(p.numel() for p in parameters),
        "dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
    }
