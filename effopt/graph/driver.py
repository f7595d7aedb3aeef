"""The one driver that applies a pattern rewrite.

It owns what every rewrite needs: candidate roots from an index, outside uses, convexity, shape and
dtype preservation, provenance, and the reason for everything that was left alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph import dataflow
from effopt.graph.matching import Matcher, Miss, State
from effopt.graph.pattern import AnyOf, Call, Capture, Named, OpBuilder
from effopt.graph.rewrite import Approve, Emit, Match, PassResult, Reject, Replacement, require
from effopt.graph.values import val

_MOST_SOLUTIONS = 8  # ambiguous operand orders tried per root before its first refusal is final


class RolledBack(Reject):
    """A replacement that was written and then not approved. It is reported wherever it happens."""


class Rule(Protocol):
    """What the driver needs of a rewrite; `passes.base.Rewrite` is the class to inherit."""

    name: ClassVar[str]
    may_duplicate: ClassVar[bool]

    def pattern(self, op: OpBuilder, *captures: Any) -> Any: ...
    def anchors(self, pattern: Any) -> tuple[Any, ...]: ...
    def legal(self, m: Match) -> None: ...
    def outputs(self, m: Match) -> tuple[Node, ...]: ...
    def rewrite(self, emit: Emit, m: Match) -> Any: ...


def pattern_of(rule: Rule) -> Any:
    """Build the pattern of a rule: its parameters after `op` are the captures, by name."""
    names = list(inspect.signature(rule.pattern).parameters)[1:]
    return rule.pattern(OpBuilder(), *(Capture(name) for name in names))


def root_targets(pattern: Any) -> tuple[Any, ...]:
    """The call targets that can be the root of a pattern."""
    if isinstance(pattern, Call):
        return pattern.targets
    if isinstance(pattern, Named):
        return root_targets(pattern.pattern)
    if isinstance(pattern, AnyOf):
        return tuple(t for option in pattern.options for t in root_targets(option))
    raise TypeError(f"the root of a pattern must be a call or any_of calls, not {type(pattern).__name__}")


def apply_rewrite(rule: Rule, module: GraphModule, approve: Approve, in_training: bool = False) -> PassResult:
    """Apply `rule` wherever it matches and is legal. Edits `module.graph`; drops cached analyses."""
    pattern = pattern_of(rule)
    driver = _Driver(rule, module.graph, pattern, approve, in_training)
    # Users before their operands: the largest form of an idea is taken before a part of it can be.
    for root in reversed(dataflow.calls_of(module.graph, root_targets(pattern))):
        if root not in driver.dead:
            driver.visit(root)
    driver.report_misses(rule.anchors(pattern))
    if driver.needs_sort:
        dataflow.sort_topologically(module.graph)
    return driver.result


class FoundRule(Protocol):
    """What the driver needs of a rewrite whose matches an analysis finds."""

    name: ClassVar[str]
    may_duplicate: ClassVar[bool]

    def legal(self, m: Match) -> None: ...
    def outputs(self, m: Match) -> tuple[Node, ...]: ...
    def rewrite(self, emit: Emit, m: Match) -> Any: ...


def apply_found(
    rule: FoundRule, module: GraphModule, matches: Sequence[Match], approve: Approve
) -> PassResult:
    """Apply `rule` to the `matches` that are legal; for what no pattern can say. Else as `apply_rewrite`."""
    driver = _Driver(rule, module.graph, None, approve)
    for match in _readers_first(sorted(matches, key=lambda m: m.root, reverse=True)):
        driver.take(match)
    if driver.needs_sort:
        dataflow.sort_topologically(module.graph)
    return driver.result


def _readers_first(matches: Sequence[Match]) -> list[Match]:
    """Each match after those that read what it gives: what they read is still the node that they found."""
    owners = {node: i for i, match in enumerate(matches) for node in match.nodes}
    readers: list[list[int]] = [[] for _ in matches]
    for i, match in enumerate(matches):
        read = {owners[a] for node in match.nodes for a in node.all_input_nodes if a in owners}
        for j in sorted(read - {i}):
            readers[j].append(i)
    order: dict[int, None] = {}
    waiting, opened = list(range(len(matches)))[::-1], set[int]()
    while waiting:
        i = waiting[-1]
        ahead = [] if i in opened else [j for j in readers[i] if j not in opened]
        opened.add(i)
        waiting.extend(ahead)
        if not ahead:
            order[waiting.pop()] = None
    return [matches[i] for i in order]


class _Driver:
    """One rule over one graph."""

    def __init__(
        self,
        rule: Rule | FoundRule,
        graph: Graph,
        pattern: Any,
        approve: Approve,
        in_training: bool = False,
    ) -> None:
        self.rule, self.graph, self.approve, self.in_training = rule, graph, approve, in_training
        self.matcher = Matcher(pattern)
        self.result = PassResult()
        self.dead: set[Node] = set()
        self.needs_sort = False
        self._explained: dict[Node, tuple[int, Node, str]] = {}
        self._done: set[Node] = set()
        self.anchors = frozenset(() if pattern is None else rule.anchors(pattern))  # type: ignore[union-attr]

    def take(self, match: Match) -> None:
        """Rewrite at one match, or note why not."""
        try:
            self._take(match)
        except Reject as why:
            if why.reason:
                self.result.reject(self.rule.name, why.node or match.root, why.reason)
        except Exception as error:  # noqa: BLE001 - a rule's own fault: undone, reported, others go on
            self._fault(match, error)

    def visit(self, root: Node) -> None:
        """Try to rewrite at `root`, and note why not."""
        refusal: tuple[State, Reject] | None = None
        for count, state in enumerate(self.matcher.solutions(root)):
            match = Match(root, state.nodes, state.captures, self.in_training)
            try:
                self._take(match)
                return
            except Reject as why:
                rolled_back = refusal is not None and isinstance(refusal[1], RolledBack)
                if refusal is None or (isinstance(why, RolledBack) and not rolled_back):
                    refusal = (state, why)
            except Exception as error:  # noqa: BLE001 - a rule's own fault: undone, reported, others go on
                self._fault(match, error)
                return
            if count + 1 == _MOST_SOLUTIONS:
                break
        if refusal is not None:
            state, reject = refusal
            has_anchor = self.anchors & {n.target for n in state.nodes}
            if reject.reason and (isinstance(reject, RolledBack) or not has_anchor):
                # No anchor would tell, and what matched in full must not be refused in silence.
                self.result.reject(self.rule.name, reject.node or root, reject.reason)
                self._done.update(state.nodes)
            self._explain(state.nodes, reject.node or root, reject.reason, weight=1000)
        else:
            self._note_miss(self.matcher.miss)

    def _fault(self, match: Match, error: Exception) -> None:
        words = str(error).strip().splitlines() or [""]
        text = f"raised {type(error).__name__}: {words[0]}"
        self.result.faults.append(f"at {match.root.name} {text}; the match was left as it was")
        self.result.reject(self.rule.name, match.root, text)
        self._done.update(match.nodes)

    def _take(self, match: Match) -> None:
        self.rule.legal(match)
        outputs = self.rule.outputs(match)
        self._check_outside_uses(match, outputs)
        place = self._place(match, outputs)
        emit = Emit(self.graph, match.root, place, self.rule.name)
        try:
            made = self.rule.rewrite(emit, match)
            new = tuple(made) if isinstance(made, (tuple, list)) else (made,)
            replacement = Replacement(dict(zip(outputs, new, strict=True)), tuple(emit.nodes), emit.note)
            self._check_values(replacement)
            reason = self.approve(self.rule, match, replacement)
            if reason is not None:
                raise RolledBack(reason, match.root)
        except BaseException:
            emit.undo()
            raise
        self._commit(match, replacement)

    def _commit(self, match: Match, replacement: Replacement) -> None:
        self.result.apply(self.rule.name, _main_op(replacement), match.root, replacement.note)
        self._done.update(match.nodes)
        self._done.update(replacement.emitted)
        for old, new in replacement.outputs.items():
            if any(user < new for user in old.users):
                self.needs_sort = True
            old.replace_all_uses_with(new)
        for node in sorted(match.nodes, reverse=True):
            if not node.users:
                self.graph.erase_node(node)
                self.dead.add(node)

    def _check_outside_uses(self, match: Match, outputs: tuple[Node, ...]) -> None:
        if self.rule.may_duplicate:
            return
        inside = set(match.nodes)
        for node in match.nodes:
            if node not in outputs:
                for user in node.users:
                    require(user in inside, f"{node.name} inside the match is also used by {user.name}", node)

    def _place(self, match: Match, outputs: tuple[Node, ...]) -> Node:
        """Before the earliest output if every operand is ready there, else before the last."""
        inside = set(match.nodes)
        operands = [a for n in match.nodes for a in n.all_input_nodes if a not in inside]
        earliest = min(outputs)
        if earliest.op == "placeholder":
            return next(n for n in self.graph.nodes if n.op != "placeholder")
        if all(a < earliest for a in operands):
            return earliest
        require(
            len(outputs) == 1 or dataflow.is_convex(self.graph, match.nodes),
            "another path leaves the match and comes back into it",
            match.root,
        )
        return max(*outputs, match.root)

    @staticmethod
    def _check_values(replacement: Replacement) -> None:
        for old, new in replacement.outputs.items():
            was, now = val(old), val(new)
            if not isinstance(was, torch.Tensor):
                continue
            same_shape = len(was.shape) == len(now.shape) and all(
                statically_known_true(a == b) for a, b in zip(was.shape, now.shape, strict=True)
            )
            require(same_shape, f"the result would be {list(now.shape)}, it was {list(was.shape)}", old)
            require(was.dtype == now.dtype, f"the result would be {now.dtype}, it was {was.dtype}", old)
            require(
                was.device == now.device, f"the result would be on {now.device}, it was on {was.device}", old
            )

    def _note_miss(self, miss: Miss) -> None:
        if miss.node is not None:
            self._explain(miss.nodes, miss.node, miss.reason, weight=0)

    def _explain(self, nodes: Sequence[Node], node: Node, reason: str, weight: int) -> None:
        """Keep, for each node that the attempt reached, the furthest attempt's reason."""
        depth = weight + len(nodes)
        for reached in (*nodes, node):
            if reached not in self._explained or depth > self._explained[reached][0]:
                self._explained[reached] = (depth, node, reason)

    def report_misses(self, anchors: Sequence[Any]) -> None:
        """One record for each attempt that reached an anchor and ended in no match."""
        told: set[tuple[int, Node, str]] = set()
        for anchor in dataflow.calls_of(self.graph, anchors):
            if anchor in self._done:
                continue
            attempt = self._explained.get(anchor, (0, anchor, self._no_root(anchor)))
            if attempt in told:
                continue
            told.add(attempt)
            _, where, reason = attempt
            if not reason:
                continue
            self.result.reject(
                self.rule.name, anchor, f"at {where.name}: {reason}" if where is not anchor else reason
            )

    def _no_root(self, anchor: Node) -> str:
        users = ", ".join(sorted({str(u.target) for u in anchor.users})) or "nothing"
        return f"no form that this pass knows is built on it; it is used by {users}"


def _main_op(replacement: Replacement) -> str:
    targets = [n.target for n in replacement.emitted]
    ours = [t for t in targets if isinstance(t, torch._ops.OpOverload) and t.namespace == "effopt"]
    chosen = ours[-1] if ours else (targets[-1] if targets else "forward operand")
    return chosen._schema.name.split("::")[1] if isinstance(chosen, torch._ops.OpOverload) else str(chosen)
