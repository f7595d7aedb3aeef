"""Zeros around a tensor, however a model adds them. Looks only."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from effopt.graph.matching import bound_arguments
from effopt.graph.values import shape_of

_aten = torch.ops.aten
_PADS = (_aten.pad.default, _aten.constant_pad_nd.default)


def zeros_around(node: Node) -> tuple[Node, tuple[tuple[Any, Any], ...]] | None:
    """What is padded with zeros, and how many are before and behind it by dimension; None if nothing is."""
    if node.target not in _PADS:
        return None
    bound = bound_arguments(node)
    source: Any = bound["input" if "input" in bound else "self"]
    if bound.get("mode", "constant") != "constant" or bound.get("value") not in (None, 0, 0.0):
        return None
    given = list(bound["pad"])
    pairs = [(given[i], given[i + 1]) for i in range(0, len(given), 2)]
    rank = len(shape_of(source))
    return source, tuple(reversed(pairs + [(0, 0)] * (rank - len(pairs))))
