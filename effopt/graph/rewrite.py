"""The one driver that applies a pattern rewrite, and the words a rewrite is written in.

The driver owns what every rewrite needs: candidate roots from an index, outside uses, convexity,
shape and dtype preservation, provenance, and the reason for everything that was left alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn, Protocol

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from effopt.errors import InvalidGraphError
from effopt.graph import dataflow
from effopt.graph.ops.base import Op
from effopt.graph.pattern import AnyOf, Call, Capture, Matcher, Miss, Named, OpBuilder, State
from effopt.graph.provenance import layer_of, source_of
from effopt.graph.values import fake_call, val

_MOST_SOLUTIONS = 8  # ambiguous operand orders tried per root before its first refusal is final


class Reject(Exception):  # noqa: N818 - a value that travels by `raise`, not an error
    """Why a structural match must be left alone."""

    def __init__(self, reason: str, node: Any = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node if isinstance(node, Node) else None


class RolledBack(Reject):
    """A replacement that was written and then not approved. It is reported wherever it happens."""


def require(condition: bool, reason: str, node: Any = None) -> None:
    """A fact that must hold for a rewrite to be right; else the match is refused with `reason`.

    An empty reason says that there is nothing to do here: it is not reported.
    """
    if not condition:
        raise Reject(reason, node)


@dataclass(frozen=True)
class Applied:
    """One rewrite that was made."""

    pass_name: str
    op: str
    node: str
    layer: str
    source: str
    note: str = ""


@dataclass(frozen=True)
class Rejected:
    """One place where a pass stopped, and why."""

    pass_name: str
    node: str
    layer: str
    source: str
    reason: str


@dataclass
class PassResult:
    """What one pass did to one graph."""

    applied: list[Applied] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    """Exceptions of the pass itself; what they touched was undone."""

    def apply(self, pass_name: str, op: str, node: Node, note: str = "") -> None:
        """Record a change at `node`."""
        self.applied.append(Applied(pass_name, op, node.name, layer_of(node), source_of(node), note))

    def reject(self, pass_name: str, node: Node, reason: str) -> None:
        """Record that `node` was left alone."""
        self.rejected.append(Rejected(pass_name, node.name, layer_of(node), source_of(node), reason))


@dataclass(frozen=True)
class Match:
    """Where a pattern matched: the root, the interior nodes, and the captures as attributes.

    A capture that the chosen alternative does not bind reads as None.
    """

    root: Node
    nodes: tuple[Node, ...]
    captures: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.captures.get(name)


@dataclass(frozen=True)
class Replacement:
    """What a rewrite proposes: for each old output its new node, and the nodes emitted for it."""

    outputs: Mapping[Node, Node]
    emitted: tuple[Node, ...]


class Rule(Protocol):
    """What the driver needs of a rewrite; `passes.base.Rewrite` is the class to inherit."""

    name: ClassVar[str]
    may_duplicate: ClassVar[bool]

    def pattern(self, op: OpBuilder, *captures: Any) -> Any: ...
    def anchors(self, pattern: Any) -> tuple[Any, ...]: ...
    def legal(self, m: Match) -> None: ...
    def outputs(self, m: Match) -> tuple[Node, ...]: ...
    def rewrite(self, emit: Emit, m: Match) -> Any: ...


Approve = Callable[[Any, Match, Replacement], str | None]
"""Asked before a replacement is taken; a string is the reason to roll it back."""


class Emit:
    """Writes new nodes before one place of a graph, with shapes and provenance filled in."""

    def __init__(self, graph: Graph, origin: Node, before: Node, pass_name: str) -> None:
        self._graph, self._origin, self._before, self._pass = graph, origin, before, pass_name
        self.nodes: list[Node] = []

    def __call__(self, op: Op | Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """Emit one call. `op` is a canonical op, an ATen overload, or `operator.getitem`."""
        target = op.overload if isinstance(op, Op) else op
        operands = [n for n in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(n, Node)]
        args, kwargs = pytree.tree_map_only(torch.SymInt, lambda s: self._size(s, operands), (args, kwargs))
        with self._graph.inserting_before(self._before):
            node = self._graph.call_function(target, args, kwargs)
        self.nodes.append(node)
        for key in ("nn_module_stack", "stack_trace", "from_node"):
            if key in self._origin.meta:
                node.meta[key] = self._origin.meta[key]
        node.meta["effopt"] = (self._pass, self._origin.name)
        node.meta["val"] = fake_call(op.fake if isinstance(op, Op) else target, args, kwargs)
        return node

    def _size(self, size: torch.SymInt, operands: Sequence[Node]) -> int | Node:
        """A node that computes a symbolic size: no graph holds a symbol. Raises Reject if none is at hand."""
        if size.node.is_constant() or size.node.expr.is_number:
            return int(size)
        for node in operands:
            value = val(node)
            for dim, other in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                if isinstance(other, torch.SymInt) and other.node.expr == size.node.expr:
                    return self(torch.ops.aten.sym_size.int, node, dim)
        raise Reject(f"the size {size} is symbolic, and no operand has it", self._origin)

    def undo(self) -> None:
        """Take back everything emitted."""
        for node in reversed(self.nodes):
            self._graph.erase_node(node)
        self.nodes.clear()


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


def find(graph: Graph, targets: Sequence[Any]) -> list[Node]:
    """All calls of `targets`, in graph order, from the index that FX keeps."""
    found = [
        n for t in dict.fromkeys(targets) for n in graph.find_nodes(op="call_function", target=t, sort=False)
    ]
    return sorted(found)


def apply_rewrite(rule: Rule, module: GraphModule, approve: Approve) -> PassResult:
    """Apply `rule` wherever it matches and is legal. Edits `module.graph`; drops cached analyses."""
    pattern = pattern_of(rule)
    driver = _Driver(rule, module.graph, pattern, approve)
    # Users before their operands: the largest form of an idea is taken before a part of it can be.
    for root in reversed(find(module.graph, root_targets(pattern))):
        if root not in driver.dead:
            driver.visit(root)
    driver.report_misses(rule.anchors(pattern))
    if driver.needs_sort:
        dataflow.sort_topologically(module.graph)
    return driver.result


class _Driver:
    """One rule over one graph."""

    def __init__(self, rule: Rule, graph: Graph, pattern: Any, approve: Approve) -> None:
        self.rule, self.graph, self.approve = rule, graph, approve
        self.matcher = Matcher(pattern)
        self.result = PassResult()
        self.dead: set[Node] = set()
        self.needs_sort = False
        self._explained: dict[Node, tuple[int, Node, str]] = {}
        self._done: set[Node] = set()
        self.anchors = frozenset(rule.anchors(pattern))

    def visit(self, root: Node) -> None:
        """Try to rewrite at `root`, and note why not."""
        refusal: tuple[State, Reject] | None = None
        for count, state in enumerate(self.matcher.solutions(root)):
            match = Match(root, state.nodes, state.captures)
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
            replacement = Replacement(dict(zip(outputs, new, strict=True)), tuple(emit.nodes))
            self._check_values(replacement)
            reason = self.approve(self.rule, match, replacement)
            if reason is not None:
                raise RolledBack(reason, match.root)
        except BaseException:
            emit.undo()
            raise
        self._commit(match, replacement)

    def _commit(self, match: Match, replacement: Replacement) -> None:
        self.result.apply(self.rule.name, _main_op(replacement), match.root)
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
        """Before the earliest output if every operand is ready there, else before the root."""
        inside = set(match.nodes)
        operands = [a for n in match.nodes for a in n.all_input_nodes if a not in inside]
        earliest = min(outputs)
        if all(a < earliest for a in operands):
            return earliest
        require(
            len(outputs) == 1 or dataflow.is_convex(self.graph, match.nodes),
            "another path leaves the match and comes back into it",
            match.root,
        )
        return match.root

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
        for anchor in find(self.graph, anchors):
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


def refuse_graph(reason: str) -> NoReturn:
    """A driver's own invariant broke; the message goes to the pass author."""
    raise InvalidGraphError(reason)


def interior_users(nodes: Sequence[Node]) -> Iterator[Node]:
    """Nodes of a region that something outside it reads."""
    inside = set(nodes)
    for node in nodes:
        if any(user not in inside for user in node.users):
            yield node
