"""All that can be tested of a pass without knowing what it does, from its samples and refusals."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields

import torch

from effopt import pipeline as pipelines
from effopt.errors import CaptureRefused
from effopt.graph.printing import listing
from effopt.passes.base import Example, Pass, Rewrite, Stage
from effopt.plugins.manager import build_registry
from effopt.testing.mutants import mutants
from effopt.testing.trial import Trial, capture_example, disagreement, is_repeatable, run_passes


@dataclass(frozen=True)
class Variant:
    """One way to capture a sample."""

    name: str
    training: bool = False
    dtype: torch.dtype | None = None
    dynamic: bool | None = False
    must_fire: bool = False
    """Where the pass has to fire; elsewhere it may refuse, and must not be wrong."""


VARIANTS = (
    Variant("inference", must_fire=True),
    Variant("training", training=True, must_fire=True),
    Variant("dynamic sizes", dynamic=True),
    Variant("bfloat16", dtype=torch.bfloat16),
    Variant("float64", training=True, dtype=torch.float64),
)


@dataclass(frozen=True)
class Unmutated:
    """A sample of which no look-alike was tried."""

    sample: str
    broken: tuple[str, ...]
    """The changes that there are, each with the call that no longer takes its operands; none: no call of it
    has an argument to change."""


@dataclass
class PassCheck:
    """What `check_pass` tried."""

    samples: int = 0
    refusals: int = 0
    variants: int = 0
    """Captured sample and variant pairs in which the pass fired and was compared."""
    mutants: int = 0
    """Look-alikes that were tried."""
    mutants_rewritten: int = 0
    """Those among them that the pass rewrote, and rightly."""
    unmutated: list[Unmutated] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """Variants that the sample itself cannot run in, and why."""
    problems: list[str] = field(default_factory=list)


def check_pass(pass_: Pass | type[Pass], *, mutate: bool = True) -> PassCheck:
    """Test a pass on its own samples and refusals.

    It fires on every sample and the result is the original within the dtype table: in inference and in
    training with gradients, with dynamic sizes, in bfloat16 and float64. It leaves every refusal
    untouched and gives the reason that the refusal names. A second run changes nothing, graphs stay
    valid, its text form reads back, its options are documented and its source is cited. Each sample's
    look-alikes (a dimension, a permutation, a constant or an operand order changed) are refused or
    rewritten rightly, with checked rewrites switched off. There is one at least, if any call of a sample has
    an argument to change.

    Args:
        pass_: an instance, or a class with default options.
        mutate: whether to try look-alikes; takes most of the time.

    Returns:
        What was tried.

    Raises:
        AssertionError: lists everything that failed.
    """
    instance = pass_ if isinstance(pass_, Pass) else pass_.build({})
    done = PassCheck()
    done.problems.extend(_form_problems(instance))
    earlier = _earlier(instance)
    for index, sample in enumerate(instance.samples()):
        done.samples += 1
        prepared = _check_sample(instance, earlier, sample, f"sample {index}", done)
        if prepared is None:
            done.problems.append(f"sample {index}: no variant of it was captured: {done.skipped[-1]}")
        elif mutate and instance.exact and isinstance(instance, Rewrite):
            _check_mutants(instance, prepared, f"sample {index}", done)
    broken = [change for sample in done.unmutated for change in sample.broken]
    if not done.mutants and broken:
        done.problems.append(f"none of {len(broken)} changes to its samples runs: {broken[0]}")
    for index, refusal in enumerate(instance.refusals()):
        done.refusals += 1
        done.problems.extend(_refusal_problems(instance, earlier, refusal, f"refusal {index}"))
    if not done.samples:
        done.problems.append("has no samples: nothing shows what it is for")
    if not done.refusals and isinstance(instance, Rewrite):
        done.problems.append("has no refusals: nothing shows what it must leave alone")
    assert not done.problems, f"{instance.name}:\n  " + "\n  ".join(done.problems)
    return done


def _form_problems(pass_: Pass) -> Iterator[str]:
    text = f"{inspect.getdoc(type(pass_)) or ''}\n{inspect.getdoc(inspect.getmodule(type(pass_))) or ''}"
    if not re.search(r"arXiv:\d{4}\.\d{4,5}|\bSource: \S+", text):
        yield "its docstring cites no source (`Source: ... arXiv:2002.05202`)"
    for option in fields(pass_):
        if not option.metadata.get("doc"):
            yield f"option {option.name!r} has no documentation; use `option(default, doc)`"
    registry = build_registry()
    registry.passes[pass_.name] = type(pass_)
    if pipelines.resolve(pass_.spec(), registry) != [pass_]:
        yield f"its text form {pass_.spec()!r} does not read back as the same pass"
    if pass_.fingerprint() != type(pass_).build(_options(pass_)).fingerprint():
        yield "its fingerprint changes from instance to instance"


def _options(pass_: Pass) -> dict[str, object]:
    """Those that were given: a default may be a value that nobody can ask for, such as an empty list."""
    return {f.name: value for f in fields(pass_) if (value := getattr(pass_, f.name)) != f.default}


def _earlier(pass_: Pass) -> list[Pass]:
    """The default passes that this one builds on: its requirements, and recognition for later stages."""
    default = [p for p in pipelines.build(build_registry()) if p.name != pass_.name]
    wanted, grew = {*pass_.requires, *pass_.after}, True
    while grew:
        more = {w for p in default if {p.name, *p.provides} & wanted for w in (*p.requires, *p.after)}
        grew = not more <= wanted
        wanted |= more
    return [
        p
        for p in default
        if p.stage <= pass_.stage
        and ({p.name, *p.provides} & wanted or (p.stage == Stage.CANONICALIZE and p.stage < pass_.stage))
    ]


def _check_sample(
    pass_: Pass, earlier: Sequence[Pass], sample: Example, where: str, done: PassCheck
) -> Trial | None:
    """Try all variants. Returns the first as it was before the pass."""
    first = None
    for variant in VARIANTS:
        if sample.training is not None and sample.training != variant.training:
            continue
        at = f"{where}, {variant.name}"
        try:
            trial = capture_example(
                sample, training=variant.training, dtype=variant.dtype, dynamic=variant.dynamic
            )
        except Exception as error:
            if variant.must_fire and (not variant.training or not isinstance(error, CaptureRefused)):
                raise
            done.skipped.append(f"{at}: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        faults = run_passes(trial, earlier).faults
        original = trial.copy()
        first = first or original
        fired, problems = _try(pass_, trial, original)
        problems = [*faults, *problems]
        done.variants += fired
        done.problems.extend(f"{at}: {problem}" for problem in problems)
        if variant.must_fire and not fired:
            done.problems.append(f"{at}: did not fire")
    return first


def _try(pass_: Pass, trial: Trial, original: Trial) -> tuple[bool, list[str]]:
    """Whether the pass fired, and what went wrong."""
    report = run_passes(trial, [pass_], verify="always")
    problems = list(report.faults)
    fired = bool(report.applied)
    if report.checks["failed"]:
        problems.append(next(r.reason for r in report.rejected if "check failed" in r.reason))
    if fired and pass_.exact and is_repeatable(original):
        problem = disagreement(original, trial)
        problems.extend([problem] if problem else [])
    if report.checks["failed"]:
        return fired, problems
    shape = listing(trial.module)
    again = run_passes(trial, [pass_])
    if again.applied or listing(trial.module) != shape:
        problems.append(f"a second run changes the graph: {[a.node for a in again.applied]}")
    return fired, problems


def _refusal_problems(pass_: Pass, earlier: Sequence[Pass], refusal: Example, where: str) -> Iterator[str]:
    trial = capture_example(refusal, training=bool(refusal.training))
    run_passes(trial, earlier)
    shape = listing(trial.module)
    # Legality alone must refuse it: checked rewrites are the second net, not the first.
    report = run_passes(trial, [pass_], verify="off")
    if report.applied:
        yield f"{where}: rewrote what it must leave alone ({refusal.reason})"
    elif listing(trial.module) != shape:
        yield f"{where}: changed the graph without a record"
    reasons = [r.reason for r in report.rejected]
    if not refusal.reason and isinstance(pass_, Rewrite):
        yield f"{where}: names no reason to be looked for"
    if refusal.reason and not any(refusal.reason in reason for reason in reasons):
        yield f"{where}: no reason holds {refusal.reason!r}; given were {reasons}"


def _check_mutants(pass_: Pass, trial: Trial, where: str, done: PassCheck) -> None:
    tried, broken = 0, list[str]()
    for words, mutant in mutants(trial, broken):
        tried += 1
        original = mutant.copy()
        if not run_passes(mutant, [pass_]).applied or not is_repeatable(original):
            continue
        done.mutants_rewritten += 1
        # Small values too: on ordinary ones an epsilon cannot be seen.
        problem = disagreement(original, mutant) or disagreement(original, mutant, scale=1e-3)
        if problem:
            done.problems.append(f"{where}, look-alike with {words}: rewritten wrongly: {problem}")
    done.mutants += tried
    if not tried:
        done.unmutated.append(Unmutated(where, tuple(broken)))
