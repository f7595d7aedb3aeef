"""Checked rewrites: each replacement is run beside what it replaces, before it takes over.

Both are evaluated on sampled inputs of the match's own shapes, dtypes and strides, and compared with a
float64 evaluation of the original. A replacement that is further from it than the dtype table allows, or
than the original's own rounding explains, is rolled back. Rewrites of one class (rule, both regions,
inputs) are checked once in a process.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node

from effopt.graph.analyses.masks import evaluate
from effopt.graph.equivalence import (
    Unchecked,
    Wrong,
    compare_gradients,
    compare_on,
    expected_of,
    other_dropout,
    tensors_in,
)
from effopt.graph.ops.base import hint
from effopt.graph.region import Region, class_of, regions_of, stored, work_flops
from effopt.graph.rewrite import Match, Replacement
from effopt.graph.sampling import ORDINARY, Draw, Sampler, sampler_of
from effopt.graph.values import val
from effopt.passes.base import Context, Pass
from effopt.plugins.hookspec import hookimpl

if TYPE_CHECKING:
    from effopt.plugins.report import GraphReport

SHARE_OF_COMPILE_TIME = 0.1
_FLOOR_S = 0.25  # the first checks of a process load kernels; a graph of ten nodes is checked all the same
_BACKEND_S_PER_NODE = 0.01  # Inductor takes 10 to 40 ms a node (Llama, 2 cores); the lower end
_CHECK_FLOPS_PER_S = 5e9  # one core, float64
_MOST_FLOPS = 2e9
_MOST_ELEMENTS = 2**26  # 512 MiB in float64
_MOST_VERDICTS = 4096

_VERDICTS: OrderedDict[Any, str | None] = OrderedDict()
"""Class of rewrites -> why it is wrong, or None. For the life of the process: keys hold all that matters."""


class Verify:
    """The plugin, one object for each compile call."""

    def __init__(self, mode: str, rtol: float | None, runs_backend: bool, report: GraphReport) -> None:
        self.mode, self.rtol, self.report = mode, rtol, report
        self._runs_backend = runs_backend
        self._started, self._nodes = time.perf_counter(), 0
        self._context: Context | None = None

    @hookimpl(wrapper=True)
    def effopt_run_pass(self, module: GraphModule, context: Context) -> Iterator[None]:
        """Remember the context that `effopt_approve_rewrite` is asked in."""
        self._context, self._nodes = context, len(module.graph.nodes)
        return (yield)

    @hookimpl(trylast=True)
    def effopt_approve_rewrite(self, pass_: Pass, match: Match, replacement: Replacement) -> str | None:
        """None keeps the rewrite; a reason rolls it back."""
        if self.mode == "off":
            return None
        start = time.perf_counter()
        try:
            return self._verdict(pass_, match, replacement)
        except Unchecked as why:
            self.report.checks["unchecked"] += 1
            self.report.unchecked[f"{pass_.name}: {why}"] += 1
            return None
        finally:
            self.report.seconds["check"] = self.report.seconds.get("check", 0.0) + time.perf_counter() - start

    def _verdict(self, pass_: Pass, match: Match, replacement: Replacement) -> str | None:
        if not pass_.exact:
            raise Unchecked("it is lossy by declaration")
        if match.root.op == "placeholder":
            return self._value_of_input(match, replacement)
        regions = regions_of(match, replacement)
        if regions is None:
            raise Unchecked("the operands that it adds or drops are defined by too many nodes")
        training = self._context is not None and self._context.training
        key = (type(pass_), pass_.spec(), training, self.rtol, class_of(*regions))
        if self.mode == "first" and key in _VERDICTS:
            self.report.checks["cached" if _VERDICTS[key] is None else "failed"] += 1
            return _VERDICTS[key]
        self._afford(regions)
        wrong = self._check(regions, training)
        if wrong is not None:
            # A rule may rest on a fact about an operand that both sides read: compute that too.
            deeper = regions_of(match, replacement, deep=True)
            if deeper is not None and deeper != regions:
                self._afford(deeper)
                wrong = self._check(deeper, training)
        reason = f"check failed on {wrong.draw}: {wrong.detail}" if wrong else None
        self.report.checks["failed" if wrong else "verified"] += 1
        _VERDICTS[key] = reason
        if len(_VERDICTS) > _MOST_VERDICTS:
            _VERDICTS.popitem(last=False)
        return reason

    def _value_of_input(self, match: Match, replacement: Replacement) -> str | None:
        """Of what stands for an input: it is what the input holds, to the bit."""
        made = evaluate(replacement.outputs[match.root])
        position = _placeholders([match.root]).index(match.root)
        given = self._context.masks.inputs[position] if self._context is not None else None
        if made is None or given is None:
            raise Unchecked("what stands for an input is too large to compute")
        same = torch.equal(made, given.detach().cpu())
        self.report.checks["verified" if same else "failed"] += 1
        return None if same else "check failed: it is not what the input holds"

    def _afford(self, regions: tuple[Region, Region]) -> None:
        """Raises Unchecked if a check would take too much time or memory."""
        before, after = regions
        nodes = {*before.inputs, *before.nodes, *after.nodes}
        elements = sum(_elements(val(n)) for n in nodes)
        if elements > _MOST_ELEMENTS:
            raise Unchecked(
                f"its tensors hold {elements / 2**20:.0f} Mi elements; the limit is {_MOST_ELEMENTS >> 20} Mi"
            )
        if self.mode == "always":
            return
        draws = len(sampler_of(before).draws)
        work = draws * (2 * work_flops(before) + work_flops(after))
        if work > _MOST_FLOPS:
            raise Unchecked(
                f"a check would take {work / 1e9:.1f} GFLOP; the limit is {_MOST_FLOPS / 1e9:.0f}"
            )
        left = self._budget_s() - self.report.seconds.get("check", 0.0)
        if work / _CHECK_FLOPS_PER_S > left:
            raise Unchecked("the time for checks, a tenth of the compile time, was used up")

    def _budget_s(self) -> float:
        so_far = self.report.seconds.get("capture", 0.0) + time.perf_counter() - self._started
        to_come = _BACKEND_S_PER_NODE * self._nodes if self._runs_backend else 0.0
        return max(_FLOOR_S, SHARE_OF_COMPILE_TIME * (so_far + to_come))

    def _check(self, regions: tuple[Region, Region], training: bool) -> Wrong | None:
        before, after = regions
        wrong = other_dropout(before, after)
        if wrong is not None:
            return wrong
        sampler = sampler_of(Region(before.inputs, (*before.nodes, *after.nodes), before.outputs))
        # Not the caller's random state: compiling must not change what a model draws.
        generator = torch.Generator().manual_seed(0)
        for draw in sampler.draws:
            filled = self._fill(sampler, draw, generator)
            wrong = compare_on(after, expected_of(before, filled), filled, draw, self.rtol)
            if wrong is not None:
                return wrong
        if training:
            filled = self._fill(sampler, ORDINARY, generator)
            return compare_gradients(before, after, filled, self._wanted(sampler), self.rtol)
        return None

    def _wanted(self, sampler: Sampler) -> frozenset[Node]:
        """Inputs through which a gradient can flow. A mask that no parameter made takes none."""
        weights = self._context.weights if self._context is not None else None
        learned = {
            node
            for node, real in zip(
                _placeholders(sampler.inputs), weights.inputs if weights else (), strict=False
            )
            if isinstance(real, torch.Tensor) and real.requires_grad
        }
        varying = (n for n in sampler.inputs if n.op != "get_attr")
        return frozenset(n for n in varying if n not in sampler.masks or learned & _ancestors(n))

    def _fill(self, sampler: Sampler, draw: Draw, generator: torch.Generator) -> list[Any]:
        values = sampler.fill(draw, generator)
        weights = self._context.weights if self._context is not None else None
        made = {entry.name: entry for entry in weights.entries} if weights is not None else {}
        for i, node in enumerate(sampler.inputs):
            if node.op != "get_attr":
                continue
            entry = made.get(str(node.target))
            if weights is None or entry is None:
                values[i] = stored(node)
                continue
            placeholders = _placeholders([node])
            drawn = dict(zip(sampler.inputs, values, strict=True))
            if any(placeholders[position] not in drawn for position in entry.inputs):
                raise Unchecked("a derived constant whose parameter is not read by the original")
            with torch.no_grad():
                values[i] = weights.evaluate(entry.name, {p: drawn[placeholders[p]] for p in entry.inputs})
        return values


def _placeholders(nodes: Sequence[Node]) -> list[Node]:
    return list(nodes[0].graph.find_nodes(op="placeholder")) if nodes else []


def _ancestors(node: Node) -> set[Node]:
    found, pending = {node}, [node]
    while pending:
        fresh = [a for a in pending.pop().all_input_nodes if a not in found]
        found.update(fresh)
        pending.extend(fresh)
    return found


def _elements(value: Any) -> int:
    return sum(hint(t.numel()) for t in tensors_in(value))
