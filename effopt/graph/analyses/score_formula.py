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
    joined: tuple[Shape, Shape] | None = None
    """Sizes to expand the node to, then to reshape it to, before `lead`: it was added to split scores."""


@dataclass(frozen=True)
class Split:
    """Dimensions of scores `[*frame, t, s]`, each as one dimension or several that are it in order."""

    counts: tuple[int, ...]
    """Of each dimension, into how many."""
    sizes: Shape
    """Size arguments of the dimensions they are split into."""


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
    shifted: bool = False
    """Whether the maximum of each row is subtracted: softmax does not see that, tanh and a fill do."""
    zeroed: bool = False
    """Whether weights are set to 0 where the masks hide keys, so that a row without a key gives 0."""
    frame: Shape = ()
    """Leading sizes of the scores at this step."""
    frame_args: tuple[Any, ...] | None = None
    """Size arguments that reshape the leading dimensions to the widest frame seen; None: as the product."""
    widest: Shape = field(default=())
    """Leading sizes of the widest frame seen."""
    batch_may_split: bool = False
    """Whether the result has the rank of the product: a batch that is split is joined again."""
    split: Split | None = None
    """What a view has split the dimensions of the scores into at this step; None: it has not."""
