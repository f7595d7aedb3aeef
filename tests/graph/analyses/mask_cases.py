"""Masks as models spell them, by kind, and look-alikes; and a form laid out as a tensor again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from effopt.graph.analyses.masks import Band, Form, Groups, Keys, Length, Prefix, RowLimit, Rows
from effopt.graph.analyses.masks import conditions as c
from effopt.graph.analyses.masks.sums import Axis, Element, Magnitude, Opaque, Quotient, Sum

Mask = Callable[..., Tensor]
"""Mask of (b, t, s) and tensors."""


def positions(t: int, s: int) -> tuple[Tensor, Tensor]:
    return torch.arange(t)[:, None], torch.arange(s)[None, :]


def four(b: int, t: int, s: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices as `transformers` broadcasts them."""
    sizes = (b, 1, t, s)
    found = []
    for i, n in enumerate(sizes):
        shape = [1, 1, 1, 1]
        shape[i] = n
        found.append(torch.arange(n).view(shape))
    return found[0], found[1], found[2], found[3]


def documents_by_positions(at: Tensor) -> Tensor:
    return (at.diff(prepend=at[:, :1] - 1, dim=-1) != 1).cumsum(-1)


def in_documents(b: int, t: int, s: int, at: Tensor) -> Tensor:
    doc = documents_by_positions(at)
    i, _, q, k = four(b, t, s)
    return (doc[i, q] == doc[i, k]) & (at[i, k] <= at[i, q]) & (at[i, k] > at[i, q] - 3)


def graph_of(mask: Mask, b: int, t: int, s: int, *given: Tensor) -> tuple[GraphModule, Node]:
    """The graph of a mask in normal form, and the node that is the mask."""
    module = make_fx(lambda *given: mask(b, t, s, *given), tracing_mode="fake", pre_dispatch=True)(*given)
    (output,) = module.graph.find_nodes(op="output")
    return module, output.args[0]


class Laid:
    """Terms of a form as boolean tensors `[b, 1, t, s]`, from the values that the graph had."""

    def __init__(self, module: GraphModule, b: int, t: int, s: int, *given: Tensor) -> None:
        run = Interpreter(module, garbage_collect_values=False)
        self.value = run.run(*given)
        self.values: Mapping[Node, Any] = run.env
        self.axes = dict(zip(("batch", "head", "query", "key"), four(b, t, s), strict=True))

    def assert_is(self, form: Form) -> None:
        """The form, laid out, is the mask."""
        got = self.all(form.terms)
        while got.dim() > self.value.dim():
            assert got.shape[0] == 1, got.shape
            got = got[0]
        torch.testing.assert_close(got.expand_as(self.value), self.value)

    def all(self, terms: Any) -> Tensor:
        total = torch.ones((), dtype=torch.bool)
        for term in terms:
            total = total & self.term(term)
        return total

    def term(self, term: Any) -> Tensor:
        q, k = self.axes["query"], self.axes["key"]
        if isinstance(term, Band):
            low = torch.tensor(True) if term.low is None else k - q >= self.sum(term.low)
            return low if term.high is None else low & (k - q <= self.sum(term.high))
        if isinstance(term, Groups):
            return self.sum(term.query) == self.sum(term.key)
        if isinstance(term, Length):
            return k < self.sum(term.limit)
        if isinstance(term, RowLimit):
            return k <= self.sum(term.limit)
        if isinstance(term, Prefix):
            return (k < self.sum(term.limit)) | self.all(term.otherwise)
        assert isinstance(term, (Keys, Rows)), term
        return self.condition(term.condition)

    def condition(self, condition: c.Condition) -> Tensor:
        if isinstance(condition, c.AtMost):
            return self.sum(condition.of) <= 0
        if isinstance(condition, c.Equal):
            return self.sum(condition.of) == 0
        if isinstance(condition, c.Given):
            found: Tensor = self.values[condition.node][tuple(map(self.sum, condition.at))]
            return found
        if isinstance(condition, c.Not):
            return ~self.condition(condition.of)
        parts = [self.condition(p) for p in condition.of]
        total = torch.tensor(isinstance(condition, c.All))
        for p in parts:
            total = total & p if isinstance(condition, c.All) else total | p
        return total

    def sum(self, s: Sum) -> Tensor:
        total = torch.tensor(s.constant)
        for atom, by in s.terms:
            total = total + self.atom(atom).to(torch.int64) * by
        return total

    def atom(self, atom: Any) -> Tensor:
        if isinstance(atom, Axis):
            return self.axes[atom.name]
        if isinstance(atom, Element):
            found: Tensor = self.values[atom.node][tuple(map(self.sum, atom.at))]
            return found
        if isinstance(atom, Quotient):
            return self.sum(atom.of) // atom.by
        if isinstance(atom, Magnitude):
            return self.sum(atom.of).abs()
        assert isinstance(atom, Opaque), atom
        given = [self.value_of(x) for x in atom.of]
        return given[0].to(atom.target[1]) if isinstance(atom.target, tuple) else atom.target(*given)

    def value_of(self, value: Any) -> Any:
        """Of anything that is read."""
        if isinstance(value, (c.AtMost, c.Equal, c.Given, c.Not, c.All, c.Some)):
            return self.condition(value)
        if isinstance(value, Sum):
            return self.sum(value)
        return self.atom(value) if isinstance(value, (Element, Opaque)) else value


_C = 3  # positions in a chunk

KINDS: dict[str, dict[str, Mask]] = {
    "none": {
        "ones": lambda b, t, s: torch.ones(t, s, dtype=torch.bool),
        "always": lambda b, t, s: torch.arange(s)[None, :].expand(t, s) >= 0,
    },
    "causal": {
        "tril": lambda b, t, s: torch.ones(t, s, dtype=torch.bool).tril(),
        "tril of numbers": lambda b, t, s: torch.ones(t, s).tril().to(torch.bool),
        "tril of bytes": lambda b, t, s: torch.ones(t, s, dtype=torch.uint8).tril() != 0,
        "bytes as truths": lambda b, t, s: torch.ones(t, s, dtype=torch.uint8).tril().to(torch.bool),
        "held in bytes": lambda b, t, s: (positions(t, s)[1] <= positions(t, s)[0]).to(torch.uint8) == 1,
        "compared": lambda b, t, s: positions(t, s)[1] <= positions(t, s)[0],
        "swapped": lambda b, t, s: positions(t, s)[0] >= positions(t, s)[1],
        "strict": lambda b, t, s: positions(t, s)[1] < positions(t, s)[0] + 1,
        "not above": lambda b, t, s: ~torch.ones(t, s, dtype=torch.bool).triu(1),
        "filled": lambda b, t, s: torch.zeros(t, s, dtype=torch.bool).masked_fill(
            positions(t, s)[1] <= positions(t, s)[0], True
        ),
        "indexed": lambda b, t, s: torch.arange(s)[four(b, t, s)[3]] <= torch.arange(t)[four(b, t, s)[2]],
        "int32": lambda b, t, s: (
            torch.arange(s, dtype=torch.int32) <= torch.arange(t, dtype=torch.int32)[:, None]
        ),
    },
    "causal, aligned at the last": {
        "compared": lambda b, t, s: positions(t, s)[1] <= positions(t, s)[0] + (s - t),
        "tril": lambda b, t, s: torch.ones(t, s, dtype=torch.bool).tril(s - t),
        "started": lambda b, t, s: torch.arange(s)[None, :] <= torch.arange(s - t, s)[:, None],
        "sliced": lambda b, t, s: torch.ones(s, s, dtype=torch.bool).tril()[s - t : s, :s],
    },
    "sliding window": {
        "compared": lambda b, t, s: (
            (positions(t, s)[1] <= positions(t, s)[0]) & (positions(t, s)[1] > positions(t, s)[0] - 4)
        ),
        "distance": lambda b, t, s: (
            (positions(t, s)[0] - positions(t, s)[1] < 4) & (positions(t, s)[0] - positions(t, s)[1] >= 0)
        ),
        "two triangles": lambda b, t, s: torch.ones(t, s, dtype=torch.bool).tril().triu(-3),
    },
    "window, both sides": {
        "absolute": lambda b, t, s: (positions(t, s)[0] - positions(t, s)[1]).abs() <= 2,
        "compared": lambda b, t, s: (
            (positions(t, s)[1] - positions(t, s)[0] <= 2) & (positions(t, s)[0] - positions(t, s)[1] <= 2)
        ),
    },
    "chunks": {
        "floor": lambda b, t, s: positions(t, s)[0] // _C == positions(t, s)[1] // _C,
        "rounded": lambda b, t, s: (
            torch.div(positions(t, s)[1], _C, rounding_mode="floor")
            == torch.div(positions(t, s)[0], _C, rounding_mode="trunc")
        ),
        "causal": lambda b, t, s: (
            (positions(t, s)[0] // _C == positions(t, s)[1] // _C)
            & (positions(t, s)[1] <= positions(t, s)[0])
        ),
    },
    "window, anchors": {
        "or": lambda b, t, s: (
            (positions(t, s)[1] <= positions(t, s)[0])
            & ((positions(t, s)[1] < 2) | (positions(t, s)[1] > positions(t, s)[0] - 4))
        ),
        "distance": lambda b, t, s: (
            ((positions(t, s)[0] - positions(t, s)[1] < 4) & (positions(t, s)[0] >= positions(t, s)[1]))
            | ((positions(t, s)[1] < 2) & (positions(t, s)[0] >= positions(t, s)[1]))
        ),
    },
    "prefix": {
        "or": lambda b, t, s: (positions(t, s)[1] < 2) | (positions(t, s)[1] <= positions(t, s)[0]),
        "where": lambda b, t, s: torch.where(
            (torch.arange(s) < 2).expand(t, s),
            torch.ones(t, s, dtype=torch.bool),
            torch.ones(t, s, dtype=torch.bool).tril(),
        ),
    },
}
"""Kind -> spelling -> mask, of masks that no input takes part in."""

_pad = torch.tensor([[0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 1, 1, 1]])
_docs = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [4, 4, 1, 1, 1, 1, 0]])
_at = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [3, 4, 0, 1, 0, 0, 1]])
_lengths = torch.tensor([3, 7])

OF_INPUTS: dict[str, dict[str, tuple[Mask, tuple[Tensor, ...]]]] = {
    "lengths": {
        "compared": (
            lambda b, t, s, n: torch.arange(s)[None, None, None, :] < n[:, None, None, None],
            (_lengths,),
        ),
        "negated": (
            lambda b, t, s, n: ~(n.view(b, 1, 1, 1) <= torch.arange(s)).expand(b, 1, t, s),
            (_lengths.int(),),
        ),
    },
    "padding": {
        "indexed": (
            lambda b, t, s, m: (
                (four(b, t, s)[3] <= four(b, t, s)[2]) & m.to(torch.bool)[four(b, t, s)[0], four(b, t, s)[3]]
            ),
            (_pad,),
        ),
        "unsqueezed": (lambda b, t, s, m: (m == 1)[:, None, None, :].expand(b, 1, t, s), (_pad,)),
    },
    "documents": {
        "numbers": (lambda b, t, s, d: (d[:, :, None] == d[:, None, :])[:, None], (_docs,)),
        "numbers, causal": (
            lambda b, t, s, d: (
                (d[:, None, :, None] == d[:, None, None, :]) & torch.ones(t, s, dtype=torch.bool).tril()
            ),
            (_docs,),
        ),
        "positions": (in_documents, (_at,)),
        "chunks from the padding": (
            lambda b, t, s, n: (
                (four(b, t, s)[3] - n[four(b, t, s)[0]]) // 3 == (four(b, t, s)[2] - n[four(b, t, s)[0]]) // 3
            ),
            (_lengths,),
        ),
    },
    "documents, anchor": {
        "first": (
            lambda b, t, s, d: (
                ((d[:, :, None] == d[:, None, :]) | (torch.arange(s) == 0))[:, None]
                & (torch.arange(s) <= torch.arange(t)[:, None])
            ),
            (_docs,),
        ),
        "joined": (
            lambda b, t, s, d: (
                ((d[:, None, :, None] == d[:, None, None, :]) & torch.ones(t, s, dtype=torch.bool).tril())
                | (torch.arange(s) < 1)
            ),
            (_docs,),
        ),
    },
    "offset": {
        "0-d": (lambda b, t, s, past: torch.arange(s) <= torch.arange(t)[:, None] + past, (torch.tensor(2),)),
        "of each entry": (
            lambda b, t, s, past: four(b, t, s)[3] <= four(b, t, s)[2] + past[:, None, None, None],
            (_lengths - 3,),
        ),
    },
    "row limit": {
        "cache position": (lambda b, t, s, at: torch.arange(s) <= at[:, None], (torch.arange(2, 9),)),
    },
    "prefix of each entry": {
        "or": (
            lambda b, t, s, n: (
                (four(b, t, s)[3] < n[:, None, None, None]) | (four(b, t, s)[3] <= four(b, t, s)[2])
            ),
            (_lengths,),
        ),
    },
}
"""Kind -> spelling -> mask and the tensors that it is made from: b 2, t 7, s 7."""
