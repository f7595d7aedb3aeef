"""The formula that attention scores are read into: `score_terms` says how.

scores = softcap * tanh(scale * q k^T / softcap) + sum of coefficient * term, where all masks are True
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

ABSORBING = -1e30
"""A finite score at or below this swallows, in float32 and bfloat16, whatever a model adds to it."""

Shape = tuple[Any, ...]


@dataclass(frozen=True)
class Term:
    """`coefficient * node`, or with `fill`, `where(node, 0, fill)`, added to the scores."""

    node: Node
    coefficient: float = 1.0
    fill: float | None = None
    inverted: bool = False
    lead: tuple[Any, ...] | None = None
    """Leading size arguments to reshape the node to, if its own leading dimensions are merged."""


@dataclass(frozen=True)
class Scores:
    """The formula so far."""

    scale: float = 1.0
    softcap: float = 0.0
    terms: tuple[Term, ...] = ()
    masks: tuple[Term, ...] = ()
    """Boolean: True (False if inverted) keeps the score, else it becomes `fill`."""
    fill: float | None = None
    factors: tuple[tuple[Any, Node], ...] = ()
    """(mul or div overload, tensor) applied per query row or head, before everything else."""
    halves: bool = False
    """Whether gradients of masked scores are halved, as `max` of two equal numbers does."""
    frame: Shape = ()
    """Leading sizes of the scores at this step."""
    frame_args: tuple[Any, ...] | None = None
    """Size arguments that reshape the leading dimensions to the widest frame seen; None: as the product."""
    widest: Shape = field(default=())
    """Leading sizes of the widest frame seen."""
