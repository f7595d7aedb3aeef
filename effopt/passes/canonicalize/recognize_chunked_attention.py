"""Recognise linear attention with gates of tokens that a model computes in chunks, as Mamba-2 does.

    pairs  = (C B^T * exp(segment sums of gates)) @ X       in each chunk
    alone  = B^T (exp(gates up to the end) * X)             the state of each chunk
    before = exp(segment sums of totals) @ cat([start, alone])
    y      = pairs + C @ before[:-1] * exp(gates from the start)
      =>  y, last = linear_attention(C, B, X, decay=gates, state=start)

Exact up to reassociation and intermediate rounding. What is computed of zeros behind the last token is left
out, and is 0 in the result. NaN or infinity spoils its token and those behind it, and none before it; in the
original all others too, by 0 * infinity. No training needed. Saves the `[b, chunks, l, l, h]` weights and the
states between chunks; a kernel chooses its own chunks.

Source: Dao & Gu 2024, arXiv:2405.21060, section 6 and listing 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.functional import pad

from effopt.graph.analyses.delta_rules import delta_rules
from effopt.graph.chunked_attention_form import ChunkedForm, read, write
from effopt.graph.driver import apply_found
from effopt.graph.rewrite import Emit, Match, PassResult
from effopt.passes.base import Context, Example, GraphPass, Stage

_aten = torch.ops.aten
_DELTA_RULE = (
    "a delta rule in chunks: what a token adds is solved for by products of keys, and no op computes that."
    " It runs as it is written; decays alone, without such a system, are recognised"
)


@dataclass(frozen=True)
class RecognizeChunkedAttention(GraphPass):
    """A graph pass, for no pattern can say that the same operands are read again at other places."""

    name: ClassVar[str] = "recognize-chunked-attention"
    stage: ClassVar[Stage] = Stage.CANONICALIZE
    may_duplicate: ClassVar[bool] = True

    def apply(self, module: GraphModule, context: Context) -> PassResult:
        """Each sum of pairs of tokens and of states, and the op."""
        roots = module.graph.find_nodes(op="call_function", target=_aten.add.Tensor)
        result = apply_found(self, module, list(map(_match, roots)), context.approve)
        for node in delta_rules(module.graph):
            result.reject(self.name, node, _DELTA_RULE)
        return result

    def legal(self, m: Match) -> None:
        if isinstance(m.form, Exception):
            raise m.form

    def outputs(self, m: Match) -> tuple[Node, ...]:
        """The sum, and the state after the last chunk."""
        form: ChunkedForm = m.form
        return (form.root, *(final.node for final in form.finals))

    def rewrite(self, emit: Emit, m: Match) -> Any:
        form: ChunkedForm = m.form
        emit.note = f"{form.tokens.chunks} chunks of {form.tokens.tokens}"
        return write(emit, form)

    def samples(self) -> Iterable[Example]:
        yield Example(_chunked, _inputs())

    def refusals(self) -> Iterable[Example]:
        given = _inputs()
        off = lambda c, b, x, g: _chunked(c, b, x, g, first=0)  # noqa: E731
        yield Example(off, given, "off by one")
        stale = lambda c, b, x, g: _chunked(c, b, x, g, other=2 * g)  # noqa: E731
        yield Example(stale, given, "decays by other gates")
        yield Example(_delta_rule, given[1:], "a delta rule in chunks")


def _match(root: Node) -> Match:
    """A sum with all that the op takes the place of; or alone, with why it is no such form."""
    try:
        form = read(root)
    except Exception as why:  # noqa: BLE001 - `legal` raises it, where the driver tells it
        return Match(root, (root,), {"form": why})
    return Match(root, form.nodes, {"form": form})


def _inputs() -> tuple[Tensor, ...]:
    c, b, x = (torch.randn(2, 10, 3, n) for n in (4, 4, 5))
    return c, b, x, -torch.rand(2, 10, 3)


def _segments(g: Tensor, first: int = 1) -> Tensor:
    t = g.shape[-1]
    sums = g.unsqueeze(-1).expand(*g.shape, t).tril(-first).cumsum(-2)
    return sums.masked_fill(torch.ones(t, t).triu(1).bool(), -torch.inf).exp()


def _delta_rule(k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    k, v, total = k.transpose(1, 2), v.transpose(1, 2), g.transpose(1, 2).cumsum(-1)
    apart = (total[..., :, None] - total[..., None, :]).tril().exp()
    return torch.linalg.solve_triangular(k @ k.mT * apart, v, upper=False, unitriangular=True)


def _chunked(
    c: Tensor, b: Tensor, x: Tensor, g: Tensor, first: int = 1, other: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    def parts(y: Tensor) -> Tensor:
        return pad(y, (0, 0) * (y.dim() - 2) + (0, 2)).unflatten(1, (3, 4))

    c, b, x, g = (parts(y) for y in (c, b, x, g))
    g = g.permute(0, 3, 1, 2)
    weights = torch.einsum("bclhn,bcshn->bclsh", c, b) * _segments(g, first).permute(0, 2, 3, 4, 1)
    total = g.cumsum(-1)
    own = total if other is None else parts(other).permute(0, 3, 1, 2).cumsum(-1)
    decayed = b * torch.exp(own[..., -1:] - own).permute(0, 2, 3, 1).unsqueeze(-1)
    alone = torch.einsum("bclhn,bclhp->bchpn", decayed, x)
    sources = torch.cat([torch.zeros_like(alone[:, :1]), alone], 1)
    carried = _segments(pad(total[..., -1], (1, 0)))
    states = torch.einsum("bhcz,bzhpn->bchpn", carried, sources)
    read = torch.einsum("bclhn,bchpn->bclhp", c, states[:, :-1]) * total.exp().permute(0, 2, 3, 1).unsqueeze(
        -1
    )
    return torch.einsum("bclsh,bcshp->bclhp", weights, x) + read, states[:, -1]
