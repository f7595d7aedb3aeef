"""The pipeline: its text form, its order, and running it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx

from effopt.errors import OptionError, PipelineError, unknown
from effopt.passes.base import Pass
from effopt.passes.plan import Plan
from effopt.plugins.manager import Registry

_ITEM = re.compile(r"\s*(?P<name>[A-Za-z0-9_.-]+)\s*(?:\{(?P<options>[^{}]*)\})?\s*(?:,|$)")
_OPTION = re.compile(r"\s*(?P<key>[A-Za-z0-9_-]+)\s*=\s*(?P<value>\[[^\]]*\]|[^,\[\]]+)\s*(?:,|$)")


def parse(text: str) -> list[tuple[str, dict[str, Any]]]:
    """`a,b{x=1,y=[1,2]}` -> `[("a", {}), ("b", {"x": 1, "y": (1, 2)})]`. Raises OptionError."""
    items, position = [], 0
    while position < len(text.rstrip()):
        found = _ITEM.match(text, position)
        if found is None:
            raise OptionError(
                f"cannot read pipeline text at {text[position:]!r};"
                " expected `name` or `name{key=value,...}`"
            )
        items.append((found["name"], _parse_options(found["options"] or "")))
        position = found.end()
    return items


def _parse_options(text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    position = 0
    while position < len(text.rstrip()):
        found = _OPTION.match(text, position)
        if found is None:
            raise OptionError(f"cannot read pass options at {text[position:]!r}; expected `key=value`")
        key = found["key"].replace("-", "_")
        if key in options:
            raise OptionError(f"option {key!r} is given twice in {text!r}")
        options[key] = _parse_value(found["value"].strip())
        position = found.end()
    return options


def _parse_value(text: str) -> Any:
    if text.startswith("["):
        return tuple(_parse_value(part.strip()) for part in text[1:-1].split(",") if part.strip())
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def text_of(pipeline: Sequence[Pass]) -> str:
    """The text form of a pipeline; `resolve` of it gives the same passes."""
    return ",".join(p.spec() for p in pipeline)


def resolve(given: Any, registry: Registry) -> list[Pass]:
    """Passes from text, names, instances, or a mixed sequence of them. Raises OptionError."""
    if isinstance(given, str):
        return [_make(name, options, registry) for name, options in parse(given)]
    if isinstance(given, Pass):
        return [given.check()]
    if isinstance(given, type) and issubclass(given, Pass):
        return [given.build({})]
    if isinstance(given, Sequence):
        return [p for item in given for p in resolve(item, registry)]
    raise OptionError(
        f"passes must be text, Pass classes or instances, or a list of them, got {given!r}"
        f" ({type(given).__name__})"
    )


def _make(name: str, options: Mapping[str, Any], registry: Registry) -> Pass:
    if name not in registry.passes:
        raise unknown("pass", name, registry.passes)
    return registry.passes[name].build(options)


def build(
    registry: Registry,
    *,
    passes: Any = (),
    pipeline: Any = None,
    disable: Sequence[str] = (),
    plans: Sequence[Plan] = (),
) -> list[Pass]:
    """The passes of one compile call, in order.

    Args:
        registry: what is registered.
        passes: added to the exact pipeline; one of the same name replaces the default instance.
        pipeline: replaces the exact pipeline altogether.
        disable: names to leave out.
        plans: their passes are added.

    Raises:
        OptionError: unknown names or options, or a pass asked for otherwise than its plan says.
        PipelineError: a cycle, a conflict or a missing requirement, named.
    """
    if pipeline is not None:
        chosen = _by_name(resolve(pipeline, registry))
    else:
        chosen = {n: c.build({}) for n, c in registry.passes.items() if c.exact and c.default}
    chosen.update(_by_name(resolve(passes, registry)))
    for section in (s for plan in plans for s in plan.sections):
        (planned,) = resolve(section.spec, registry)
        asked = chosen.setdefault(planned.name, planned)
        if asked != planned:
            raise OptionError(f"{asked.spec()} was asked for, and the plan is of {section.spec}; use one")
    for name in disable:
        if name not in registry.passes and name not in chosen:
            raise unknown("pass to disable", name, registry.passes)
        chosen.pop(name, None)
    members = list(chosen.values())
    registry.hook.effopt_pipeline(pipeline=members)
    return order(members)


def _by_name(passes: Sequence[Pass]) -> dict[str, Pass]:
    found: dict[str, Pass] = {}
    for p in passes:
        if found.setdefault(p.name, p) != p:
            raise OptionError(f"{found[p.name].spec()} and {p.spec()} were both asked for; use one")
    return found


def order(passes: Sequence[Pass]) -> list[Pass]:
    """Sort by stage, then by `requires`, `provides` and `after`; otherwise as given.

    Raises:
        PipelineError: names the cycle, the conflict, or the requirement that nothing provides.
    """
    names = {p.name for p in passes}
    providers: dict[str, list[Pass]] = {}
    for p in passes:
        for fact in (p.name, *p.provides):
            providers.setdefault(fact, []).append(p)
        for other in p.conflicts:
            if other in names:
                raise PipelineError(f"{p.name} and {other} conflict; disable one of them")
    graph = nx.DiGraph()
    graph.add_nodes_from(p.name for p in passes)
    for p in passes:
        for fact in p.requires:
            if fact not in providers:
                raise PipelineError(f"{p.name} requires {fact!r}, which no pass in the pipeline provides")
        for fact in (*p.requires, *p.after):
            graph.add_edges_from((q.name, p.name) for q in providers.get(fact, ()) if q is not p)
    for earlier in passes:
        for later in passes:
            if earlier.stage < later.stage and graph.has_edge(later.name, earlier.name):
                raise PipelineError(
                    f"{earlier.name} ({earlier.stage.name}) must come after {later.name}"
                    f" ({later.stage.name}), a later stage"
                )
    rank = {p.name: (p.stage, i) for i, p in enumerate(passes)}
    try:
        sorted_names = list(nx.lexicographical_topological_sort(graph, key=lambda n: rank[n]))
    except nx.NetworkXUnfeasible:
        cycle = " -> ".join(edge[0] for edge in nx.find_cycle(graph))
        raise PipelineError(f"passes depend on each other in a cycle: {cycle}") from None
    by_name = {p.name: p for p in passes}
    return sorted((by_name[n] for n in sorted_names), key=lambda p: p.stage)
