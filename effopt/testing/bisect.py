"""Find the first wrong rewrite of a model, and write it down as a program of its own.

Rewrites are numbered by fuel. With none the model is right, with all of them it is wrong: the first that
makes it wrong is found by halving.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from effopt.compile import effopt, record
from effopt.graph.equivalence import difference, tensors_in
from effopt.graph.ops.base import hint
from effopt.graph.provenance import layer_of, source_of
from effopt.graph.region import regions_of, to_module
from effopt.graph.rewrite import Applied, Match, Replacement
from effopt.graph.tolerances import tolerance_of
from effopt.graph.values import val
from effopt.passes.base import Pass
from effopt.plugins.hookspec import hookimpl

_ALL = 10**9  # rewrites; no graph has as many

Make = Callable[[], tuple[Callable[..., Any], Sequence[Any]]]
"""Builds the model and its positional inputs, the same each time."""


@dataclass(frozen=True)
class Culprit:
    """The first rewrite after which the result is wrong."""

    fuel: int
    """How many rewrites it takes, this one included."""
    applied: Applied
    error: str
    """How the result differs from eager."""
    runs: int
    """Compilations that the search took."""
    repro: str
    """A program that runs the region before and after, and exits with 1 if they differ."""


def bisect(
    make: Make,
    options: Mapping[str, Any] | None = None,
    *,
    rtol: float | None = None,
    say: Callable[[str], None] = lambda words: None,
) -> Culprit | None:
    """The first wrong rewrite of a model, or None if the result agrees with eager.

    Checks of rewrites are off while searching: what is looked for is what they did not find.

    Args:
        make: builds the model and its inputs; called once for each run.
        options: of `torch.compile`; `fuel` and `verify` are set by the search. Without `lowering` the
            search runs without Inductor.
        rtol: what counts as wrong, relative to the largest magnitude; the dtype table times ten if not
            given, since errors of a whole model add up.
        say: told about each run.
    """
    settings = {"lowering": "eager", **(options or {}), "verify": "off"}
    expected = _eager(make)
    runs = 0

    def error_with(fuel: int) -> tuple[str, int]:
        nonlocal runs
        runs += 1
        problem, used = _run(make, settings, expected, rtol, fuel)
        say(f"{used} rewrites: {problem or 'right'}")
        return problem, used

    problem, total = error_with(_ALL)
    if not problem:
        return None
    if error_with(0)[0]:
        raise ValueError(
            f"the model differs from eager without any rewrite: {problem}; no rewrite is at fault"
        )
    low, high = 0, total
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if error_with(middle)[0] else (middle, high)
    witness = _Witness(high)
    problem, _ = _run(make, settings, expected, rtol, high, witness)
    kept = witness.guilty()
    return Culprit(high, kept.applied, problem, runs + 1, kept.program())


def _eager(make: Make) -> list[Tensor]:
    model, inputs = make()
    with torch.no_grad():
        return [t.detach().clone() for t in tensors_in(_flat(model(*inputs)))]


def _flat(result: Any) -> Any:
    """Outputs of models are tensors, sequences, mappings, or objects that are mappings."""
    return list(result.values()) if isinstance(result, Mapping) else result


def _run(
    make: Make,
    options: Mapping[str, Any],
    expected: Sequence[Tensor],
    rtol: float | None,
    fuel: int,
    witness: _Witness | None = None,
) -> tuple[str, int]:
    """(how the result differs, most rewrites made in one graph) under `fuel`."""
    model, inputs = make()
    given = {**options, "fuel": fuel}
    if witness is not None:
        given["plugins"] = [*given.get("plugins", ()), witness]
    torch._dynamo.reset()
    with torch.no_grad(), record() as report:
        got = tensors_in(_flat(torch.compile(model, backend=effopt, options=given)(*inputs)))
    torch._dynamo.reset()
    used = max((graph.checks["fuel used"] for graph in report.graphs), default=0)
    for a, b in zip(got, expected, strict=True):
        allowed = rtol if rtol is not None else 10 * tolerance_of(b.dtype).rtol
        problem = difference(a, b, b, allowed, allowed)
        if problem:
            return problem, used
    return "", used


@dataclass(frozen=True)
class _Kept:
    """One rewrite, and both of its sides if its context is small enough to be taken out."""

    applied: Applied
    before: GraphModule | None = None
    after: GraphModule | None = None
    inputs: tuple[Node, ...] = ()

    def differs(self) -> bool:
        """Whether the sides differ on the values that the program draws."""
        if self.before is None or self.after is None:
            return False
        space: dict[str, Any] = {"__name__": "repro"}
        try:
            exec(compile(self.program(), "repro", "exec"), space)
        except SystemExit as end:
            return bool(end.code)
        return False

    def program(self) -> str:
        """The rewrite as source."""
        where = (
            f"{self.applied.pass_name} at {self.applied.node}, {self.applied.layer}, {self.applied.source}"
        )
        if self.before is None or self.after is None:
            return (
                f'"""One rewrite of effopt: {where}.\n\nIts context is too large to be written down.\n"""\n'
            )
        lines = [f"    {_generator(val(node))},  # {node.name}" for node in self.inputs]
        return _PROGRAM.format(
            what=where,
            inputs="\n".join(lines),
            before=_source(self.before, "before"),
            after=_source(self.after, "after"),
        )


class _Witness:
    """Keeps the rewrite with a given number, of each graph: each has its own fuel."""

    def __init__(self, number: int) -> None:
        self.number, self.seen = number, 0
        self.kept: list[_Kept] = []

    @hookimpl
    def effopt_compile_start(self) -> None:
        """Count from zero again."""
        self.seen = 0

    @hookimpl(trylast=True)
    def effopt_approve_rewrite(self, pass_: Pass, match: Match, replacement: Replacement) -> None:
        """Count, and keep the one."""
        self.seen += 1
        if self.seen != self.number:
            return
        root = match.root
        emitted = str(replacement.emitted[-1].target) if replacement.emitted else "an operand"
        applied = Applied(pass_.name, emitted, root.name, layer_of(root), source_of(root))
        found = regions_of(match, replacement)
        if found is None:
            self.kept.append(_Kept(applied))
        else:
            before, after = found
            self.kept.append(_Kept(applied, to_module(before), to_module(after), before.inputs))

    def guilty(self) -> _Kept:
        """The kept rewrite whose sides differ; the last if that cannot be told on drawn values."""
        return next((kept for kept in self.kept if kept.differs()), self.kept[-1])


def _generator(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(hint(value) if isinstance(value, torch.SymInt) else value)
    sizes, strides = [hint(s) for s in value.shape], [hint(s) for s in value.stride()]
    return f"sample({sizes}, {strides}, {value.dtype})"


def _source(module: GraphModule, name: str) -> str:
    code = module.graph.python_code("self").src.strip()
    signature, _, body = code.partition("\n")
    parameters = signature[signature.index("(") :].replace("(self, ", "(").replace("(self)", "()")
    return f"def {name}{parameters}\n{body}"


_PROGRAM = '''"""One rewrite of effopt: {what}.

Run it: it exits with 1 if the two sides differ.
"""

import sys

import torch
from torch import device, inf, nan

import effopt.graph.ops  # defines torch.ops.effopt


def sample(sizes, strides, dtype):
    """Random values of that shape and layout."""
    extent = 1 + sum((s - 1) * st for s, st in zip(sizes, strides)) if all(sizes) else 0
    if dtype.is_floating_point:
        storage = torch.randn(extent, dtype=torch.float64).to(dtype)
    else:
        storage = torch.randint(0, 2, (extent,)).to(dtype)
    return storage.as_strided(sizes, strides)


{before}


{after}


torch.manual_seed(0)
inputs = (
{inputs}
)
failed = False
for index, (was, now) in enumerate(zip(before(*inputs), after(*inputs))):
    apart = (was.double() - now.double()).abs().max().item()
    largest = was.double().abs().max().item()
    print(f"result {{index}}: largest difference {{apart:.3g}}, largest magnitude {{largest:.3g}}")
    failed |= not torch.allclose(was, now, rtol=1e-3, atol=1e-4, equal_nan=True)
sys.exit(failed)
'''


def write_repro(culprit: Culprit, path: str | Path) -> None:
    """Write the program to a file."""
    Path(path).write_text(culprit.repro, encoding="utf-8")


def make_from(model: torch.nn.Module, inputs: Sequence[Any]) -> Make:
    """A `make` that gives copies of one model and its inputs."""

    def make() -> tuple[Callable[..., Any], Sequence[Any]]:
        return copy.deepcopy(model), [i.clone() if isinstance(i, Tensor) else copy.copy(i) for i in inputs]

    return make
