"""What a pass is. A pass is a frozen dataclass: its fields are its options.

`Rewrite` matches a pattern, `RegionPass` (`region.py`) and `SitePass` (`site.py`) decide layer by layer or
site by site and follow plans, `GraphPass` does neither and says why. Nothing is stored on `self` while a
pass runs.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node

from effopt.errors import OptionError, unknown
from effopt.graph.driver import apply_rewrite
from effopt.graph.held_masks import HeldMasks
from effopt.graph.pattern import OpBuilder
from effopt.graph.rewrite import Approve, Emit, Match, PassResult
from effopt.graph.sources import digest_of_effopt
from effopt.graph.weights import DerivedWeights
from effopt.passes.plans import Plans
from effopt.target import Target


class Stage(enum.IntEnum):
    """The stages of the pipeline, in order."""

    CANONICALIZE = 1  # every spelling of an idea becomes one canonical op
    CLEANUP = 2  # what that left without a use, or equal to something else
    LAYERS = 3  # layers skipped or dropped
    KV = 4  # caches shared or shrunk
    ATTENTION = 5  # masks proved, attention replaced
    QUANTIZE = 6  # weights and activations in fewer bits
    FUSE = 7  # canonical ops joined
    FINISH = 8  # a last cleanup


@dataclass(frozen=True)
class Context:
    """What a pass may ask about the compile call that it runs in."""

    target: Target
    training: bool
    """Whether a backward pass will be taken through the graph."""
    approve: Approve
    """Asked by the driver before each rewrite is taken."""
    weights: DerivedWeights
    """Constants derived from parameters."""
    plans: Plans = field(default_factory=Plans)
    """Decisions of passes that plan: those given, and those taken in this graph."""
    masks: HeldMasks = field(default_factory=HeldMasks)
    """What is known of buffers, and guarded."""


@dataclass(frozen=True)
class Example:
    """A graph for tests, as a function of tensors: what a pass must rewrite, or must leave alone."""

    run: Any
    """A function, or a `torch.nn.Module`, of the inputs."""
    inputs: tuple[Any, ...]
    reason: str = ""
    """For a refusal: a part of the reason that the report must give."""
    training: bool | None = None
    """True or False where the example holds only in that mode."""


@dataclass(frozen=True)
class Pass(ABC):
    """The contract: valid graph in, valid graph out, and a record for everything done or left."""

    name: ClassVar[str]
    stage: ClassVar[Stage]
    exact: ClassVar[bool] = True
    """The same function up to floating-point reassociation. A lossy pass runs only when asked for."""
    default: ClassVar[bool] = True
    """Whether the exact pipeline holds it; False for those that cost something else, such as memory."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Facts (or pass names) that must be provided earlier in the pipeline."""
    provides: ClassVar[tuple[str, ...]] = ()
    """Facts that hold afterwards. Its own name is always one."""
    after: ClassVar[tuple[str, ...]] = ()
    """Passes or facts it must follow if they are there."""
    conflicts: ClassVar[tuple[str, ...]] = ()
    """Passes that must not be in the same pipeline."""

    @abstractmethod
    def apply(self, module: GraphModule, context: Context) -> PassResult:
        """Transform `module.graph` in place."""

    def samples(self) -> Iterable[Example]:
        """Graphs that the pass must rewrite."""
        return ()

    def refusals(self) -> Iterable[Example]:
        """Look-alikes that it must leave alone, each with its reason."""
        return ()

    def spec(self) -> str:
        """The text form: the name, and the options that differ from their defaults."""
        changed = []
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if value != option.default:
                changed.append(f"{option.name}={_write(value)}")
        return f"{self.name}{{{','.join(changed)}}}" if changed else self.name

    def fingerprint(self) -> str:
        """Identity for caches: options, the version of torch, and the source of the pass and of all effopt.

        A pass stands on analyses, ops and lowerings, so an edit anywhere in effopt is a new identity.
        """
        try:
            source = inspect.getsource(inspect.getmodule(type(self)) or type(self))
        except (OSError, TypeError):  # typed at a prompt: known to this process alone
            source = f"process {os.getpid()}, {id(type(self))}"
        parts = (source, self.spec(), torch.__version__, digest_of_effopt())
        return hashlib.sha256("|".join(parts).encode()).hexdigest()

    @classmethod
    def build(cls, options: Mapping[str, Any]) -> Pass:
        """An instance with `options`, checked. Raises OptionError that names the fault."""
        _check_named(cls)
        fields_by_name = {f.name: f for f in dataclasses.fields(cls)}
        for key, value in options.items():
            if key not in fields_by_name:
                raise unknown(f"option of {cls.name}", key, fields_by_name or ["(it has none)"])
            _check_option(cls.name, fields_by_name[key], value)
            if value == () and not fields_by_name[key].metadata.get("empty", True):
                raise OptionError(f"{cls.name}: option {key!r} is empty; leave it out, or the pass")
        return cls(**options)

    def check(self) -> Pass:
        """Itself, with options as `build` would take them. Raises OptionError."""
        _check_named(type(self))
        for option in dataclasses.fields(self):
            _check_option(self.name, option, getattr(self, option.name))
        return self


@dataclass(frozen=True)
class Rewrite(Pass):
    """A pass that replaces every legal match of one pattern."""

    may_duplicate: ClassVar[bool] = True
    """Whether interior values that something else also reads may be computed a second time."""

    def apply(self, module: GraphModule, context: Context) -> PassResult:
        """Run the shared driver with this rule."""
        return apply_rewrite(self, module, context.approve, context.training)

    @abstractmethod
    def pattern(self, op: OpBuilder, *captures: Any) -> Any:
        """The subgraph to find; parameter names after `op` are the captures."""

    def anchors(self, pattern: Any) -> tuple[Any, ...]:
        """Call targets that make a place worth a reason when nothing matched there. None by default."""
        return ()

    def legal(self, m: Match) -> None:
        """Facts beyond structure, one `require` a line. Raises `Reject`."""

    def outputs(self, m: Match) -> tuple[Node, ...]:
        """The matched nodes whose values the replacement takes over; the root alone by default."""
        return (m.root,)

    @abstractmethod
    def rewrite(self, emit: Emit, m: Match) -> Any:
        """Emit the replacement: one node for each of `outputs`, in that order."""


@dataclass(frozen=True)
class PlannedPass(Pass):
    """A lossy pass that decides place by place, and does what a plan says where there is one.

    `RegionPass` (`region.py`) does so for layers, `SitePass` (`site.py`) for anything else. A decision is
    JSON and says all that carrying it out needs, so that one plan may hold what several specs decided.
    """

    exact: ClassVar[bool] = False
    alternatives: ClassVar[tuple[str, ...]] = ()
    """Specs between which `effopt.tune` chooses at each place, unless it is given others; none: it leaves
    the pass alone."""

    @abstractmethod
    def choices(
        self, module: GraphModule, context: Context, result: PassResult
    ) -> Mapping[str, Sequence[Any]]:
        """Path of each place in this graph -> what may be decided there, alone. Nothing is changed.

        Args:
            module: the graph as this pass would get it.
            context: of the call.
            result: takes the reason for each place that is left out.
        """


@dataclass(frozen=True)
class GraphPass(Pass):
    """A pass over the whole graph, for what no pattern can say. Its docstring says why."""


def _write(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{','.join(_write(v) for v in value)}]"
    return str(value)


def _check_named(pass_: type[Pass]) -> None:
    for word, example in (("name", '"merge-relu-pair"'), ("stage", "Stage.FUSE")):
        if not hasattr(pass_, word):
            raise OptionError(f"pass class {pass_.__name__} has no `{word}`, such as `{word} = {example}`")


def _check_option(pass_name: str, option: dataclasses.Field[Any], value: Any) -> None:
    kinds = {
        "int": (int,),
        "float": (int, float),
        "bool": (bool,),
        "str": (str,),
        "tuple[int, ...]": (tuple,),
    }
    declared = str(option.type)
    allowed = kinds.get(declared, (object,))
    if not isinstance(value, allowed) or (
        isinstance(value, bool) and bool not in allowed and object not in allowed
    ):
        raise OptionError(
            f"{pass_name}: option {option.name!r} must be {declared}, got {value!r} ({type(value).__name__})"
        )
    strange = next((v for v in value if type(v) is not int), None) if isinstance(value, tuple) else None
    if strange is not None and declared == "tuple[int, ...]":
        raise OptionError(f"{pass_name}: option {option.name!r} must hold whole numbers, got {strange!r}")
    low, high = option.metadata.get("min"), option.metadata.get("max")
    choices = option.metadata.get("choices")
    if choices is not None and value not in choices:
        raise OptionError(
            f"{pass_name}: option {option.name!r} must be one of {list(choices)}, got {value!r}"
        )
    if (low is not None and not value >= low) or (high is not None and not value <= high):  # NaN is neither
        raise OptionError(f"{pass_name}: option {option.name!r} must lie in [{low}, {high}], got {value!r}")


def option(default: Any, doc: str, **bounds: Any) -> Any:
    """An option of a pass: `bits: int = option(4, "bits a weight", choices=(4, 8))`."""
    return field(default=default, metadata={"doc": doc, **bounds})
