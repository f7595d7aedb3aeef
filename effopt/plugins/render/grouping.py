"""Many records as few lines: equal layers under one path, equal reasons under one heading."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from effopt.graph.rewrite import Rejected
    from effopt.plugins.report import LoweringRecord

_NODE_NUMBER = re.compile(r"\b(?P<op>[A-Za-z_]*[A-Za-z])(?:_\d+)+\b")


@dataclass(frozen=True)
class Place:
    """Where a group of records is: layers, written compactly, and the lines of the model."""

    count: int
    layers: tuple[str, ...]
    sources: tuple[str, ...]
    nodes: tuple[str, ...]


def compact(paths: Iterable[str]) -> tuple[str, ...]:
    """`a.0.b, a.1.b, a.2.b, head` -> `a.{0..2}.b, head`, sorted; the top level is `(model)`."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for path in sorted(set(paths), key=natural):
        parts = path.split(".") if path else ["(model)"]
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is None:
            groups.setdefault(tuple(parts), [])
        else:
            key = (*parts[:number], "*", *parts[number + 1 :])
            groups.setdefault(key, []).append(int(parts[number]))
    return tuple(
        ".".join(_ranges(values) if part == "*" else part for part in key) for key, values in groups.items()
    )


def natural(layer: str) -> list[tuple[int, str]]:
    """Sort key of a layer path: `layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in layer.split(".")]


def _ranges(numbers: Sequence[int]) -> str:
    ordered = sorted(set(numbers))
    if len(ordered) == 1:
        return str(ordered[0])
    runs: list[list[int]] = []
    for number in ordered:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [str(r[0]) if len(r) == 1 else f"{r[0]}..{r[-1]}" for r in runs]
    return f"{{{','.join(texts)}}}"


def general(reason: str) -> str:
    """A reason without the numbers of node names, equal for equal layers."""
    return _NODE_NUMBER.sub(lambda found: found["op"], reason)


def short_source(source: str) -> str:
    """`modeling_llama.py:243 in forward` of a full path."""
    return source.rsplit("/", 1)[-1]


def place_of(records: Sequence[Rejected]) -> Place:
    """Where these records are."""
    return Place(
        len(records),
        compact(r.layer for r in records),
        tuple(dict.fromkeys(short_source(r.source) for r in records if r.source)),
        tuple(r.node for r in records),
    )


def near_misses(records: Iterable[Rejected]) -> list[tuple[str, str, Place]]:
    """(pass, reason, where) for each distinct reason, the most frequent first."""
    groups: dict[tuple[str, str], list[Rejected]] = {}
    for record in records:
        groups.setdefault((record.pass_name, general(record.reason)), []).append(record)
    found = [(pass_name, reason, place_of(group)) for (pass_name, reason), group in groups.items()]
    return sorted(found, key=lambda item: (item[0], -item[2].count))


def kernels(records: Iterable[LoweringRecord]) -> list[tuple[str, str, int, tuple[tuple[str, str], ...]]]:
    """(op, kernel, how often, reasons of the others) for each distinct choice."""
    groups: dict[tuple[str, str, tuple[tuple[str, str], ...]], int] = {}
    for record in records:
        reasons = tuple((name, general(reason)) for name, reason in record.refused)
        key = (record.op, record.kernel, reasons)
        groups[key] = groups.get(key, 0) + 1
    return [(op, kernel, count, reasons) for (op, kernel, reasons), count in sorted(groups.items())]


def by_reason(refused: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """(names joined by commas, reason): kernels with one reason together, where the first of them stood."""
    groups: dict[str, list[str]] = {}
    for name, reason in refused:
        groups.setdefault(reason, []).append(name)
    return [(", ".join(names), reason) for reason, names in groups.items()]
