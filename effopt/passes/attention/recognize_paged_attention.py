"""Attend to keys where they lie in the pages of a pool, instead of gathering them first.

    attention(q, pages[table] as [b,hkv,s,d], value_pages[table] as .., mask = key < lengths)     one query
    attention(q, .., mask = key <= query + lengths - t)                                           the last t
        =>  paged_attention(q, pages, value_pages, table, lengths)

Exact: pool, table, slots and heads are followed through indexing, views and repeats; lengths are proved by
`graph.analyses.masks`. A page below 0 stays one from the end, a row without a key stays NaN where it was one.
What the mask hides is not read: a hidden value that is NaN or infinite, which makes the original NaN by 0 *
NaN, has no part in the result, and a page outside of the pool is an error only where its keys are seen.
Inference only: kernels for pages have no gradients. No training needed. Saves writing and reading all keys
and values that the table has room for, and reading the pages beyond a length.

Source: Kwon et al. 2023, arXiv:2309.06180, sections 4.1 and 5.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.functional import scaled_dot_product_attention as attend

from effopt.graph.analyses.gathered_pages import gathers
from effopt.graph.paged_attention_form import PagedForm, read, write
from effopt.graph.rewrite import Emit, Match, PassResult, Replacement, require
from effopt.passes.attention_pass import AttentionPass
from effopt.passes.base import Context, Example


@dataclass(frozen=True)
class RecognizePagedAttention(AttentionPass):
    """Each attention over keys and values that are gathered by one table."""

    name: ClassVar[str] = "recognize-paged-attention"
    after: ClassVar[tuple[str, ...]] = (
        "prove-causal",
        "eliminate-common-subexpressions",
        "eliminate-dead-code",
    )

    def apply(self, module: GraphModule, context: Context) -> PassResult:
        """As every rewrite, but where nothing is gathered."""
        if not gathers(module.graph):
            return PassResult()

        def approve(rule: Any, m: Match, replacement: Replacement) -> str | None:
            # What is compared begins before the gather: an embedding is one, and elsewhere taken as given.
            form: PagedForm = m.once(read)
            nodes = (*form.keys.between, *form.values.between, *m.nodes)
            return context.approve(rule, replace(m, nodes=tuple(dict.fromkeys(nodes))), replacement)

        return super().apply(module, replace(context, approve=approve))

    def legal(self, m: Match) -> None:
        m.once(read)
        reason = "training: no kernel here gives gradients to attention over pages"
        require(not m.in_training, reason, m.root)

    def rewrite(self, emit: Emit, m: Match) -> Any:
        return write(emit, m, m.once(read))

    def samples(self) -> Iterable[Example]:
        given = _, pool, table, lengths = _inputs()
        yield Example(_step, given, training=False)
        drafted = torch.randn(2, 4, 3, 8)
        yield Example(_last, (drafted, pool.transpose(1, 2).contiguous(), table % 7, lengths), training=False)

    def refusals(self) -> Iterable[Example]:
        given = q, pool, table, lengths = _inputs()
        yield Example(_step, given, "training: ", training=True)

        def two_tables(q: Tensor, pool: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
            return _attended(q, _laid_out(pool, table), _laid_out(pool, table - 1), lengths)

        yield Example(two_tables, given, "one table serves both", training=False)

        def turned(q: Tensor, pool: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
            k = pool[table.T].reshape(2, 12, 2, 8).transpose(1, 2)
            return _attended(q, k, k, lengths)

        yield Example(turned, given, "does not say, at [request, key // 4]", training=False)

        def of_heads(q: Tensor, pool: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
            k = _laid_out(pool, table)
            return attend(q, k, k, (torch.arange(12) < lengths[:, None])[:, None], enable_gqa=True)

        yield Example(of_heads, (q, pool, table, torch.arange(4)), "differs between heads", training=False)

        def written(q: Tensor, pool: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
            k = _laid_out(pool, table)
            pool[table[:, 0], lengths] = q[:, :2, 0]
            return _attended(q, k, k, lengths)

        yield Example(written, given, "after they are gathered", training=False)

        def masked(q: Tensor, pool: Tensor, table: Tensor, seen: Tensor) -> Tensor:
            k = _laid_out(pool, table)
            return attend(q, k, k, seen[:, None, None], enable_gqa=True)

        seen = torch.arange(12) < lengths[:, None]
        yield Example(masked, (q, pool, table, seen), "not proved to hide just", training=False)


def _inputs() -> tuple[Tensor, ...]:
    table = torch.tensor([[4, 0, 6], [3, -1, 5]])
    return torch.randn(2, 4, 1, 8), torch.randn(7, 4, 2, 8), table, torch.tensor([3, 2])


def _laid_out(pool: Tensor, table: Tensor) -> Tensor:
    return pool[table].flatten(1, 2).transpose(1, 2)


def _attended(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    seen = torch.arange(k.shape[2]) < lengths[:, None]
    return attend(q, k, v, seen[:, None, None], enable_gqa=True)


def _step(q: Tensor, pool: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    k = _laid_out(pool, table)
    return _attended(q, k, k, lengths)


def _last(q: Tensor, pool: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    k = pool.index_select(0, table.flatten()).unflatten(0, table.shape).transpose(1, 2).flatten(2, 3)
    k, t = k.repeat_interleave(2, 1), q.shape[2]
    rows = (lengths[:, None] - t + torch.arange(t))[:, None, :, None]
    scores = (q @ k.mT).masked_fill(torch.arange(k.shape[2]) > rows, -torch.inf)
    return scores.softmax(-1) @ k
