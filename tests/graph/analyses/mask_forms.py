"""Forms read from masks, and whether one is of a kind."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from effopt.graph.analyses import masks
from effopt.graph.analyses.masks import Band, Form, Groups, Keys, Length, Prefix, RowLimit
from effopt.graph.analyses.masks.sums import Element, whole
from tests.graph.analyses.mask_cases import Mask, graph_of

INF = float("inf")


def read(mask: Mask, b: int, t: int, s: int, *inputs: Tensor) -> Form:
    return masks.form_of(graph_of(mask, b, t, s, *inputs)[1])


FOUND: dict[str, Callable[[Form], bool]] = {
    "none": lambda f: f.terms == (),
    "causal": lambda f: f.terms == (Band(high=whole(0)),),
    "causal, aligned at the last": lambda f: f.terms == (Band(high=whole(4)),),
    "sliding window": lambda f: f.terms == (Band(whole(-3), whole(0)),),
    "window, both sides": lambda f: f.terms == (Band(whole(-2), whole(2)),),
    "chunks": lambda f: [t.chunk for t in f.terms if isinstance(t, Groups)] == [3],
    "window, anchors": lambda f: (
        [(t.limit, t.otherwise[0].low) for t in f.terms if isinstance(t, Prefix)] == [(whole(2), whole(-3))]
    ),
    "documents, anchor": lambda f: (
        [any(isinstance(o, Groups) for o in t.otherwise) for t in f.terms if isinstance(t, Prefix)] == [True]
    ),
    "prefix": lambda f: [t.limit for t in f.terms if isinstance(t, Prefix)] == [whole(2)],
    "lengths": lambda f: len(f.terms) == 1 and isinstance(f.terms[0], Length),
    "padding": lambda f: any(isinstance(t, Keys) for t in f.terms),
    "documents": lambda f: [t.chunk in (None, 3) for t in f.terms if isinstance(t, Groups)] == [True],
    "offset": lambda f: len(f.terms) == 1 and isinstance(f.band.high.only, Element),  # type: ignore[union-attr]
    "row limit": lambda f: len(f.terms) == 1 and isinstance(f.terms[0], RowLimit),
    "prefix of each entry": lambda f: isinstance(f.terms[0], Prefix),
}


DOCS = torch.tensor([0, 0, 1, 1, 2, 2, 2])
