"""The words that a rewrite is written in, and the records of what it did. `driver.py` applies it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from effopt.graph.ops.base import Op
from effopt.graph.provenance import layer_of, source_of
from effopt.graph.values import fake_call, val


class Reject(Exception):  # noqa: N818 - a value that travels by `raise`, not an error
    """Why a structural match must be left alone."""

    def __init__(self, reason: str, node: Any = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node if isinstance(node, Node) else None


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
    bytes_before: int = 0
    """Of the weights that were replaced; 0 where none were."""
    bytes_after: int = 0


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

    def apply(
        self,
        pass_name: str,
        op: str,
        node: Node,
        note: str = "",
        *,
        weight_bytes: tuple[int, int] = (0, 0),
    ) -> None:
        """Record a change at `node`; `weight_bytes` are those of its weights before and after."""
        self.applied.append(
            Applied(pass_name, op, node.name, layer_of(node), source_of(node), note, *weight_bytes)
        )

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
    in_training: bool = False
    """Whether a backward pass will be taken through the graph; told by `apply_rewrite` alone."""
    known: dict[Callable[[Match], Any], Any] = field(default_factory=dict, compare=False, repr=False)

    def once(self, question: Callable[[Match], Any]) -> Any:
        """What `question(self)` answers: between `legal` and `rewrite` the graph stays as it is."""
        if question not in self.known:
            self.known[question] = question(self)
        return self.known[question]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.captures.get(name)


@dataclass(frozen=True)
class Replacement:
    """What a rewrite proposes: for each old output its new node, and the nodes emitted for it."""

    outputs: Mapping[Node, Node]
    emitted: tuple[Node, ...]
    note: str = ""


Approve = Callable[[Any, Match, Replacement], str | None]
"""Asked before a replacement is taken; a string is the reason to roll it back."""


class Emit:
    """Writes new nodes before one place of a graph, with shapes and provenance filled in."""

    def __init__(self, graph: Graph, origin: Node, before: Node, pass_name: str) -> None:
        self._graph, self._origin, self._before, self._pass = graph, origin, before, pass_name
        self.nodes: list[Node] = []
        self.note = ""
        """What the report says of this rewrite besides its pass and op."""

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
        node.meta["val"] = fake_call(op.fake if isinstance(op, Op) else target, args, kwargs, self._origin)
        return node

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        """`node` in another dtype: itself if it has that one."""
        if val(node).dtype == dtype:
            return node
        return self(torch.ops.aten._to_copy.default, node, dtype=dtype)

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
