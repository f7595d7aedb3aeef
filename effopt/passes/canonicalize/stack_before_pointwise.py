"""Move pointwise work that each step of a loop does on its read-out behind the loop.

    for t in range(T):                                  for t in range(T):
        s = g[t] * s + k[t, :, None] * v[t, None]           s = g[t] * s + k[t, :, None] * v[t, None]
        z = g[t] * z + k[t]                         =>      z = g[t] * z + k[t]
        y = (q[t] @ s) / (q[t] @ z + eps)                   os.append(q[t] @ s)
        ys.append(y * silu(o[t]))                           zs.append(q[t] @ z)
    ys = stack(ys)                                      ys = stack(os) / (stack(zs) + eps) * silu(o)

Exact: the same calls on the same values, once instead of in each step. Only in loops over time whose state is
added to, and only what nothing in the loop reads. No training needed. Saves some calls a step; the read-outs
that are left can be recognised, and a normaliser is a loop of its own then.

Source: Katharopoulos et al. 2020, arXiv:2006.16236, section 3.4.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from effopt.graph.analyses.lockstep import Along, Apply
from effopt.graph.analyses.over_time import timed
from effopt.graph.analyses.step_work import Each, works
from effopt.graph.driver import apply_found
from effopt.graph.layouts import laid_out_as, require_dense
from effopt.graph.rewrite import Emit, Match, PassResult
from effopt.graph.steps import Steps
from effopt.graph.values import shape_of, val
from effopt.passes.base import Context, Example, GraphPass, Stage

_aten = torch.ops.aten


@dataclass(frozen=True)
class StackBeforePointwise(GraphPass):
    """A graph pass, for no pattern can say "and so on for every step"."""

    name: ClassVar[str] = "stack-before-pointwise"
    stage: ClassVar[Stage] = Stage.CANONICALIZE
    may_duplicate: ClassVar[bool] = True

    def apply(self, module: GraphModule, context: Context) -> PassResult:
        """Each collection of what is made of a loop's states."""
        matches = [Match(work.collected.node, work.nodes, {"work": work}) for work in works(module.graph)]
        return apply_found(self, module, matches, context.approve)

    def legal(self, m: Match) -> None:
        m.work.require_inside()
        require_dense(m.root)

    def outputs(self, m: Match) -> tuple[Node, ...]:
        return (m.root,)

    def rewrite(self, emit: Emit, m: Match) -> Any:
        found, sizes = m.work.collected, shape_of(m.root)
        axes = tuple("t" if dim == found.axis else f"x{dim}" for dim in range(len(sizes)))
        own = tuple(None if axis == "t" else axis for axis in axes if found.keeps_axis or axis != "t")
        whole = timed(_of_all(emit, m.work.tree, {}), own)
        steps = Steps(emit, dict(zip(axes, sizes, strict=True)), backwards=False)
        node = steps.expanded(steps.laid_out(whole, axes), axes)
        node = emit(_aten.flip.default, node, [found.axis]) if m.work.is_turned else node
        emit.note = f"{len(found.values)} steps"
        return laid_out_as(emit, emit.cast(node, val(m.root).dtype), m.root)

    def samples(self) -> Iterable[Example]:
        q, k, v, g = _inputs()
        yield Example(lambda q, k, v: _loop(q, k, v, lambda y, z, t: y / (z + 1e-3)), (q, k, v))
        yield Example(
            lambda q, k, v, g: _loop(q, k, v, lambda y, z, t: g[:, :, t].sigmoid() * y), (q, k, v, g)
        )
        yield Example(_normalised_backwards, (q, k, v))

    def refusals(self) -> Iterable[Example]:
        q, k, v, _ = _inputs()
        yield Example(_fed_back, (q, k, v), "is also read by")
        yield Example(_normalised, (q, k, v), "is also read by")


def _of_all(emit: Emit, tree: Any, known: dict[Sequence[Node], Any]) -> Any:
    """The tree with values that are computed one by one collected, each once."""
    if isinstance(tree, Each):
        if tree.nodes not in known:
            known[tree.nodes] = Along(emit(_aten.stack.default, list(tree.nodes), 0), 0, 0, 1, False)
        return known[tree.nodes]
    if not isinstance(tree, Apply):
        return tree
    return replace(tree, args=tuple(_of_all(emit, below, known) for below in tree.args))


def _inputs() -> tuple[Tensor, ...]:
    q, k, v = (torch.rand(2, 3, 4, n) for n in (4, 4, 5))
    return q, k, v, torch.randn(2, 3, 4, 5)


def _loop(q: Tensor, k: Tensor, v: Tensor, work: Any) -> Tensor:
    s, z, out = q.new_zeros(2, 3, 4, 5), q.new_zeros(2, 3, 4), []
    for t in range(q.shape[2]):
        s = s + k[:, :, t, :, None] * v[:, :, t, None]
        z = z + k[:, :, t]
        y = (q[:, :, t, :, None] * s).sum(-2)
        out.append(work(y, (q[:, :, t] * z).sum(-1, keepdim=True), t))
    return torch.stack(out, 2)


def _normalised_backwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s, out = q.new_zeros(2, 3, 4, 5), torch.zeros_like(v)
    for t in reversed(range(q.shape[2])):
        s = 0.5 * s + k[:, :, t, :, None] * v[:, :, t, None]
        out[:, :, t] = torch.nn.functional.silu(v[:, :, t]) * (q[:, :, t, None] @ s).squeeze(2)
    return out


def _fed_back(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a step gives is the next one's value: a recurrent network."""
    s, y, out = q.new_zeros(2, 3, 4, 5), v[:, :, 0], []
    for t in range(q.shape[2]):
        s = 0.5 * s + k[:, :, t, :, None] * y.unsqueeze(-2)
        y = torch.tanh((q[:, :, t, :, None] * s).sum(-2)) * v[:, :, t]
        out.append(y)
    return torch.stack(out, 2)


def _normalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A mean over a step's own read-out is not pointwise."""
    norm = lambda y, z, t: y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)  # noqa: E731
    return _loop(q, k, v, norm)
