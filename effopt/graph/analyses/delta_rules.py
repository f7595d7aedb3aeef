"""Where a graph solves for what a delta rule adds to its state, for all tokens of a chunk at once.

    solve_triangular((key @ key^T * decay), value)        with ones on the diagonal

Each token's value is less what the state, with the values before it, already holds for its key: a triangular
system of products of keys. Looks only.

Source: Yang et al. 2024, arXiv:2406.06484.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from effopt.graph.analyses.between_matmuls import follows_matmul
from effopt.graph.dataflow import calls_of
from effopt.graph.matching import bound_arguments

_SOLVE = torch.ops.aten.linalg_solve_triangular.default


def delta_rules(graph: Graph) -> Iterator[Node]:
    """The first call that solves each system."""
    seen: set[Any] = set()
    for node in calls_of(graph, (_SOLVE,)):
        system, _, upper, left, unitriangular = bound_arguments(node).values()
        if system not in seen and unitriangular and left and not upper and follows_matmul(system):
            seen.add(system)
            yield node
