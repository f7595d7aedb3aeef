"""Plans: what an inexact pass decided, layer by layer or site by site, written down.

A plan is made once (`effopt.calibrate`, `effopt.tune`), can be printed, saved and read, and is carried out
mechanically in every graph of the model: prefill, decode, every shape. A graph that it does not fit is an
error that names the first difference, for a layer skipped in one graph and run in another would be a wrong
result.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph

from effopt.errors import PlanError
from effopt.graph import ops
from effopt.graph.analyses.layers import Layer, Stack
from effopt.graph.analyses.weight_source import parameter_path
from effopt.graph.provenance import clean_path, layer_of
from effopt.graph.values import shape_of

_STACKS, _SITES = "effopt-plan/1", "effopt-plan/2"
"""The second has `sites` in its sections. A plan without any is written as the first, for older readers."""


@dataclass(frozen=True)
class Entry:
    """One layer, or one site, in a plan."""

    path: str
    """Its module path, such as `model.layers.3`; counted, such as `layer 3`, where it has none."""
    kind: str
    """Class of a layer's module, empty where it has none; what a site is, such as `linear [704, 256]`."""
    decision: Any
    """What is done to it, as JSON; None leaves it as it is."""
    score: float | list[float] | None = None
    """What was measured of it: its score, a list where its parts have scores of their own, or under
    `effopt.tune` the share of the budget it takes alone."""


@dataclass(frozen=True)
class PlannedStack:
    """The layers of one residual stream, in order."""

    width: int
    """Size of the stream's last dimension."""
    layers: tuple[Entry, ...]


@dataclass(frozen=True)
class PlannedSites:
    """The sites of one graph: a graph that has one of them has all that are to change."""

    sites: tuple[Entry, ...]


@dataclass(frozen=True)
class Section:
    """What one pass decided."""

    spec: str
    """The pass in text form, options included."""
    stacks: tuple[PlannedStack, ...] = ()
    graphs: tuple[PlannedSites, ...] = ()
    """Of a pass that decides by site; such a pass has no stacks."""

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All layers and sites."""
        layers = (entry for stack in self.stacks for entry in stack.layers)
        return (*layers, *(entry for graph in self.graphs for entry in graph.sites))

    @property
    def name(self) -> str:
        """The name of the pass."""
        return self.spec.split("{")[0]

    def decisions_for(self, stack: Stack) -> tuple[Any, ...]:
        """The decisions for the layers of a stack, in order. Raises PlanError with the first difference."""
        found = describe(stack)
        named = {entry.path: planned for planned in self.stacks for entry in planned.layers}
        planned = next((named[e.path] for e in found.layers if e.path in named), None)
        if planned is None:
            known = ", ".join(e.path for s in self.stacks for e in (s.layers[0], s.layers[-1]))
            raise PlanError(
                f"the plan of {self.spec} does not fit this model: it has no layer {found.layers[0].path!r}"
                f" (its stacks begin and end with {known or 'nothing'})"
            )
        difference = _difference(planned, found)
        if difference:
            raise PlanError(f"the plan of {self.spec} does not fit this model: {difference}")
        return tuple(entry.decision for entry in planned.layers)

    def refuse_other_layers(self, graph: Graph, found: Iterable[Stack]) -> None:
        """Raise PlanError if a graph runs a layer that is to change and is in no stack of `found`."""
        known = {layer.path for stack in found for layer in stack.layers}
        planned = {e.path for s in self.stacks for e in s.layers if e.decision is not None} - known
        if planned and not known and graph.find_nodes(op="call_function", target=ops.attention.overload):
            raise PlanError(
                f"the plan of {self.spec} cannot be carried out: this graph holds attention and no stack of"
                " layers. It is a piece of a model, cut by a graph break or compiled layer by layer; compile"
                " the model whole"
            )
        for node in graph.nodes:
            name = parameter_path(node) if node.op == "placeholder" else layer_of(node)
            parts = name.split(".") if node.users else []
            path = next((p for i in range(len(parts)) if (p := ".".join(parts[: i + 1])) in planned), None)
            if path is not None:
                raise PlanError(
                    f"the plan of {self.spec} cannot be carried out: this graph runs {path!r}, which cannot"
                    " be told apart as a layer of a stack. Compile the model whole, without graph breaks or"
                    " gradient checkpointing; effopt.explain(model, ...) without the plan says more"
                )


@dataclass(frozen=True)
class Plan:
    """The decisions of one or more passes for one model."""

    sections: tuple[Section, ...]
    report: Any = field(default=None, compare=False, repr=False)
    """What `effopt.tune` measured on the way to this plan (`TuningReport`). It is not saved with it."""

    def __str__(self) -> str:
        lines = []
        for section in self.sections:
            lines.append(section.spec)
            for entry in section.entries:
                done = "as it is" if entry.decision is None else json.dumps(entry.decision)
                numbers = entry.score if isinstance(entry.score, list) else [entry.score]
                told = " ".join(f"{number:.6f}" for number in numbers if number is not None)
                score = f"  score {told}" if told else ""
                lines.append(f"  {entry.path}: {done}{score}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The plan as JSON text (layout `effopt-plan/1`; `effopt-plan/2` if it holds sites)."""
        has_sites = any(section.graphs for section in self.sections)
        sections = [_as_data(section) for section in self.sections]
        return json.dumps({"format": _SITES if has_sites else _STACKS, "sections": sections}, indent=1)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read what `to_json` wrote. Raises PlanError if it is something else."""
        try:
            data = json.loads(text)
            if data["format"] not in (_STACKS, _SITES):
                raise PlanError(
                    f"the plan has format {data['format']!r}; this version reads {_STACKS!r} and {_SITES!r}"
                )
            return Plan(tuple(_section(s) for s in data["sections"]))
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, PlanError):
                raise
            raise PlanError(f"this is not a plan ({type(error).__name__}: {error})") from error

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan that `save` wrote. Raises PlanError if the file holds something else."""
        return Plan.from_json(Path(path).read_text(encoding="utf-8"))


def _section(data: Mapping[str, Any]) -> Section:
    stacks = tuple(
        PlannedStack(int(s["width"]), tuple(Entry(**entry) for entry in s["layers"])) for s in data["stacks"]
    )
    graphs = tuple(PlannedSites(tuple(Entry(**entry) for entry in g)) for g in data.get("graphs", ()))
    return Section(str(data["pass"]), stacks, graphs)


def _as_data(section: Section) -> dict[str, Any]:
    stacks = [
        {"width": stack.width, "layers": [vars(entry) for entry in stack.layers]} for stack in section.stacks
    ]
    graphs = [[vars(entry) for entry in graph.sites] for graph in section.graphs]
    return {"pass": section.spec, "stacks": stacks, **({"graphs": graphs} if graphs else {})}


def describe(
    stack: Stack,
    decisions: Sequence[Any] | None = None,
    scores: Sequence[float | list[float] | None] | None = None,
) -> PlannedStack:
    """A stack of a graph as a plan records it."""
    count = len(stack.layers)
    entries = zip(stack.layers, decisions or [None] * count, scores or [None] * count, strict=True)
    width = shape_of(stack.layers[0].entry)[-1]
    return PlannedStack(int(width), tuple(Entry(x.path, _kind(x), d, s) for x, d, s in entries))


def _kind(layer: Layer) -> str:
    for node in layer.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            if clean_path(str(path)) == layer.path:
                return getattr(kind, "__name__", str(kind).rpartition(".")[2])
    return ""


def _difference(planned: PlannedStack, found: PlannedStack) -> str | None:
    """The first way in which a stack is not the planned one, or None."""
    for index, (was, now) in enumerate(zip(planned.layers, found.layers, strict=False)):
        if was.path != now.path:
            return f"layer {index} is {now.path!r}, planned was {was.path!r}"
        if was.kind != now.kind:
            return f"{now.path!r} is a {now.kind or 'part without a module'}, planned was {was.kind!r}"
    if len(planned.layers) != len(found.layers):
        return f"it has {len(found.layers)} layers, the plan {len(planned.layers)}"
    if planned.width != found.width:
        return f"{found.layers[0].path!r} is {found.width} wide, planned was {planned.width}"
    return None


def parameters_of(graph: Graph, inputs: Sequence[Any]) -> dict[Any, torch.nn.Parameter]:
    """Placeholder -> the real parameter that it reads."""
    nodes = graph.find_nodes(op="placeholder")
    pairs = zip(nodes, inputs, strict=False)
    return {node: value for node, value in pairs if isinstance(value, torch.nn.Parameter)}
