"""One way to compress a model, from its options to its figures."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effopt.caches import cache_for
from effopt.calibration import calibrate
from effopt.compile import check_options, effopt, record
from effopt.decoding import Decoder, weight_bytes
from effopt.errors import EffoptError, OptionError
from effopt.graph.release import NAME as RELEASE
from effopt.graph.release import REPLACES
from effopt.passes.base import Pass
from effopt.passes.plan import Plan
from effopt.passes.region import RegionPass
from effopt.pipeline import resolve
from effopt.plugins.manager import Registry
from effopt.plugins.render.grouping import near_misses
from effopt.plugins.report import Report
from effopt.quality.evaluate import evaluate
from effopt.quality.texts import Probe, Text, Tier
from effopt.tradeoff.result import Row, Untouched, Way

_CALIBRATION_TOKENS, _CALIBRATION_BATCHES = 512, 4


@dataclass(frozen=True)
class Decoding:
    """How decoding is timed: one row, always the likeliest token."""

    prompt_tokens: int = 128
    """The beginning of the first text, as much of it as there is."""
    cache_tokens: int = 1024
    """Of the cache of fixed size; at most the context that the model was made for."""
    rounds: int = 9
    steps: int = 16
    """Tokens a round."""

    def __post_init__(self) -> None:
        if self.rounds < 3:
            raise OptionError(f"rounds must be at least 3, for quartiles; got {self.rounds}")
        if self.steps < 1 or self.prompt_tokens < 1 or self.cache_tokens < 2:
            raise OptionError(f"steps and tokens must be at least 1, and the cache must hold 2; got {self}")

    def within(self, context: int | None) -> Decoding:
        """The same for a model of this context."""
        tokens = self.cache_tokens if context is None else min(self.cache_tokens, context)
        prompt = min(self.prompt_tokens, tokens - 1)
        return dataclasses.replace(self, cache_tokens=tokens, prompt_tokens=prompt)


@dataclass(frozen=True)
class Task:
    """What all ways are measured by."""

    model: nn.Module
    reference: Callable[[Tensor], Any]
    """The model, run eagerly."""
    texts: Sequence[Text]
    probes: Sequence[Probe]
    tier: Tier
    decoding: Decoding
    calibration: Text | None
    """Seen by passes that decide from data."""
    lowering: str


class Contender:
    """Compiles its own copy of the model, and keeps it for as long as it is to be timed."""

    def __init__(self, way: Way, registry: Registry, lowering: str) -> None:
        """Check the options. Raises what a compile call would: OptionError or PipelineError."""
        plans = [resolve(section.spec, registry) for section in (way.plan.sections if way.plan else ())]
        self.way, self.asked = way, [*resolve(way.passes, registry), *(p for plan in plans for p in plan)]
        self.row = Row(way)
        self.decoder: Decoder | None = None
        releases = any(REPLACES in p.provides for p in self.asked)
        self.options: dict[str, Any] = {
            "passes": way.passes,
            "plans": way.plan or (),
            "release_weights": releases,
            "lowering": lowering,
        }
        check_options(self.options)

    @property
    def scored(self) -> list[Pass]:
        """Passes that have to see data before they decide, and for which no plan has decided."""
        planned = {section.name for section in (self.way.plan.sections if self.way.plan else ())}
        return [p for p in self.asked if isinstance(p, RegionPass) and p.is_scored and p.name not in planned]

    def attempt(self, step: Callable[[], None]) -> None:
        """Do something that may fail; what it raises is the row, and the memory is given back."""
        try:
            step()
        except Exception as error:  # noqa: BLE001 - the other ways go on; the row and the exit code say so
            # Dynamo wraps what a backend raises.
            cause = getattr(error, "inner_exception", error)
            said = str(cause).strip().split("\n")[0]
            self.row, self.decoder = Row(self.way, error=f"{type(cause).__name__}: {said}"), None

    def measure(self, task: Task, progress: Callable[[str], None]) -> None:
        """All but the speed."""
        model = copy.deepcopy(task.model)
        with record() as report:
            compiled = self._compiled(model, task)
            progress("judging")
            quality = evaluate(
                reader(compiled, model),
                task.texts,
                reference=task.reference,
                probes=task.probes,
                tier=task.tier,
            )
            _raise_faults(report)
            progress("compiling a decoding step")
            decoded = self._decode(model, compiled, report, task)
        _raise_faults(report)
        names = dict.fromkeys(p.name for p in self.asked)
        self.row = dataclasses.replace(
            Row(self.way, quality, **decoded),
            weight_bytes=weight_bytes(model),
            compile_s=sum(sum(graph.seconds.values()) for graph in report.graphs),
            applied=(applied := {name: _places(report, name) for name in names}),
            untouched=tuple(_untouched(report, applied)),
        )

    def time_round(self, steps: int) -> None:
        """Add one round of decoding to the row."""
        assert self.decoder is not None
        self.decoder.decode(1)  # Dynamo looks for this copy's code among those of the others
        seconds = self.decoder.seconds_a_token(steps)
        self.row = dataclasses.replace(self.row, decode_s=(*self.row.decode_s, seconds))

    def _compiled(self, model: nn.Module, task: Task) -> Callable[..., Any]:
        options = dict(self.options)
        if self.scored:
            given = [self.way.plan] if self.way.plan else []
            options["plans"] = [*given, _calibrated(self.scored, model, task)]

        # A backend of its own: Dynamo would answer the second copy of a model with the first one's code.
        def own(*args: Any, **settings: Any) -> Callable[..., Any]:
            return effopt(*args, **settings)

        return torch.compile(model.forward, backend=own, dynamic=False, options=options)

    def _decode(
        self, model: nn.Module, compiled: Callable[..., Any], report: Report, task: Task
    ) -> dict[str, Any]:
        """The figures of a decoded token, by field of `Row`; a note if the model does not decode."""
        how = task.decoding
        plan = Plan(tuple(section for graph in report.graphs for section in graph.planned))
        try:
            cache = cache_for(model, plan, max_cache_len=how.cache_tokens)
        except EffoptError as error:
            return {"notes": (f"decoding was not measured: {error}",)}
        prompt = task.texts[0].tokens[None, : how.prompt_tokens].to(_device(model))
        decoder = Decoder(compiled, cache, prompt, how.cache_tokens)
        decoder.begin()
        with record() as one_step:
            decoder.decode(1)
        decoder.decode(2)
        self.decoder = decoder
        costs = [graph.cost for graph in one_step.graphs]
        return {
            "kv_bytes": decoder.kv_bytes,
            "flops_a_token": _total(costs, "flops_after"),
            "bytes_a_token": _total(costs, "bytes_after"),
        }


def reader(forward: Callable[..., Any], model: nn.Module) -> Callable[[Tensor], Any]:
    """`forward` of a model as a function of token ids alone, on any device, without a cache."""
    return lambda tokens: forward(**_call(model, tokens))


def _call(model: nn.Module, tokens: Tensor) -> dict[str, Any]:
    """Arguments for token ids, on the model's device, without a cache."""
    names = list(inspect.signature(model.forward).parameters)
    extra = {"use_cache": False} if "use_cache" in names else {}
    return {names[0]: tokens.to(_device(model)), **extra}


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _calibrated(passes: Sequence[Pass], model: nn.Module, task: Task) -> Plan:
    assert task.calibration is not None, "a pass that decides from data has some"
    size = min(_CALIBRATION_TOKENS, task.tier.context)
    parts = [
        part for part in task.calibration.tokens.split(size) if len(part) == size or size > len(part) > 1
    ]
    batches = [_call(model, part[None]) for part in parts[:_CALIBRATION_BATCHES]]
    return calibrate(model, batches, list(passes))


def _total(costs: Sequence[Mapping[str, float]], key: str) -> float | None:
    """Over the graphs of a step; None if one of them was left as it is, and so has no cost."""
    return sum(cost[key] for cost in costs) if costs and all(key in cost for cost in costs) else None


def _raise_faults(report: Report) -> None:
    """A pass that failed was undone: the model that runs is not the one asked for."""
    refused = [f"a graph was left as it is: {graph.refused}" for graph in report.graphs if graph.refused]
    for fault in (*report.faults, *refused):
        raise EffoptError(fault)


def _places(report: Report, name: str) -> int:
    """How many places a pass changed, in the graph where it changed most: the graphs are of one model."""
    return max((sum(a.pass_name == name for a in graph.applied) for graph in report.graphs), default=0)


def _untouched(report: Report, applied: Mapping[str, int]) -> Iterator[Untouched]:
    """What passes left, reason by reason; a place that several graphs have counts once."""
    asked = [r for r in report.rejected if r.pass_name in (*applied, RELEASE)]
    once = {(r.pass_name, r.layer, r.reason): r for r in asked}
    for name, reason, place in near_misses(list(once.values())):
        yield Untouched(name, reason, place.count)
    for name, count in applied.items():
        if not count and all(r.pass_name != name for r in asked):
            yield Untouched(name, "found nothing to change", 0)
