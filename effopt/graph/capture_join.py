"""Puts the pieces of a graph whose equal blocks were traced once together, in the order of the program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from effopt.graph.analyses.blocks import Run
from effopt.graph.values import val

POSITION = "effopt_position"
"""Key of `custom` metadata, which traces hand on: where in the program a node comes from."""
_OWN_META = ("stack_trace", "source_fn_stack", "from_node")


@dataclass
class Piece:
    """One run of equal blocks, traced."""

    run: Run
    groups: list[list[tuple[int, int]]]
    returned: list[int]
    body: GraphModule
    first_input: int = 0
    """Position, among the outer graph's inputs, of the first result of the first copy."""
    first_output: int = 0
    """Position, among the outer graph's outputs, of the first operand of the first copy."""


def join(
    module: GraphModule, outer: GraphModule, pieces: list[Piece], inputs: int, written: int
) -> GraphModule:
    """Copy all pieces into one graph, in the order of the program."""
    joiner = _Joiner(list(module.graph.nodes), outer, pieces, inputs, written)
    (output,) = module.graph.find_nodes(op="output")
    joiner.copy_all()
    values = joiner.outer_outputs[: written + len(output.args[0])]
    joiner.joined.graph.output(tuple(map_arg(values, lambda n: joiner.value(_OUTER, 0, n))))
    for node in joiner.joined.graph.find_nodes(op="call_function", target=torch.ops.aten.item.default):
        if not node.users:  # a number that is known by now: the blocks hold it
            joiner.joined.graph.erase_node(node)
    joiner.joined.recompile()
    return joiner.joined


_OUTER = -1


class _Joiner:
    """Copies traced nodes on demand. A node is named by its piece (or `_OUTER`), its copy, and itself."""

    def __init__(
        self, program: list[Node], outer: GraphModule, pieces: list[Piece], inputs: int, written: int
    ) -> None:
        self.program = program
        self.position = {node: i for i, node in enumerate(program)}
        self.outer, self.pieces = outer, pieces
        self.joined = GraphModule(torch.nn.Module(), Graph())
        self.outer_outputs = _outputs(outer)
        self.env: dict[tuple[int, int, Node], Node] = {}
        self._operands: dict[tuple[int, int, Node], Any] = {}
        self._results: dict[Node, tuple[int, int, Any]] = {}
        self._sizes: dict[str, Node] = {}
        parameters = list(outer.graph.find_nodes(op="placeholder"))
        for node in parameters[:inputs]:
            self.env[_OUTER, 0, node] = made = self.joined.graph.node_copy(node)
            if isinstance(val(node), torch.SymInt):
                self._sizes.setdefault(str(val(node).node.expr), made)
        for k, piece in enumerate(pieces):
            given = list(piece.body.graph.find_nodes(op="placeholder"))
            for c in range(len(piece.run.instances)):
                start = written + piece.first_output + c * len(given)
                self._operands.update(((k, c, p), self.outer_outputs[start + i]) for i, p in enumerate(given))
                start = piece.first_input + c * len(piece.returned)
                self._results.update(
                    (parameters[start + i], (k, c, r)) for i, r in enumerate(_outputs(piece.body))
                )

    def copy_all(self) -> None:
        """Copy every traced node, in program order as far as its operands allow."""
        waiting = [(at, _OUTER, 0, node) for at, node in _placed(self.outer, {})]
        for k, piece in enumerate(self.pieces):
            for c in range(len(piece.run.instances)):
                places = {self.position[n]: self.position[o] for n, o in self._origins(k, c).items()}
                waiting += [(at, k, c, node) for at, node in _placed(piece.body, places)]
        for _, k, c, node in sorted(waiting, key=lambda entry: entry[0]):
            self.value(k, c, node)

    def _origins(self, k: int, c: int) -> dict[Node, Node]:
        """For each node of a block's first copy, the same one of copy `c`."""
        instances = self.pieces[k].run.instances
        return dict(zip(instances[0], instances[c], strict=True))

    def value(self, k: int, c: int, node: Node) -> Node:
        """The copy of a node, made now if it was not yet."""
        key = (k, c, node)
        if key not in self.env:
            if key in self._operands:
                self.env[key] = self.value(_OUTER, 0, self._operands[key])
            elif k == _OUTER and node in self._results:
                self.env[key] = self.value(*self._results[node])
            elif isinstance(val(node), torch.SymInt):
                self.env[key] = self._size(k, c, node)
            else:
                self.env[key] = self._copy(k, c, node)
        return self.env[key]

    def _size(self, k: int, c: int, node: Node) -> Node:
        """A symbolic size: the first that was made of its formula, as a trace of the whole program has it."""
        formula = str(val(node).node.expr)
        if formula not in self._sizes:
            self._sizes[formula] = self._copy(k, c, node)
        return self._sizes[formula]

    def _copy(self, k: int, c: int, node: Node) -> Node:
        made = self.joined.graph.node_copy(node, lambda operand: self.value(k, c, operand))
        if node.op == "get_attr":
            holder = self.outer if k == _OUTER else self.pieces[k].body
            made.target = self._attribute(k, str(node.target), getattr(holder, str(node.target)))
        made.meta = dict(node.meta)
        custom = dict(made.meta.pop("custom", {}))
        position = custom.pop(POSITION, None)
        if custom:
            made.meta["custom"] = custom
        if k != _OUTER and position is not None:
            own = self._origins(k, c)[self.program[position]].meta
            made.meta.update({key: own[key] for key in _OWN_META if key in own})
            made.meta["nn_module_stack"] = _named_stack(own)
        return made

    def _attribute(self, k: int, name: str, held: Any) -> str:
        unique = name if k == _OUTER else f"{name}_of_block_{k}"
        if not hasattr(self.joined, unique):
            setattr(self.joined, unique, held)
        return unique


def _named_stack(meta: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Module stack with the classes by name, as a trace has it."""

    def name(kind: Any) -> str:
        return kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"

    return {key: (path, name(kind)) for key, (path, kind) in (meta.get("nn_module_stack") or {}).items()}


def _placed(traced: GraphModule, places: Mapping[int, int]) -> Iterator[tuple[int, Node]]:
    """The calls of a piece with their place in the program; one without a place follows the last."""
    last = -1
    for node in traced.graph.nodes:
        if node.op not in ("placeholder", "output"):
            origin = node.meta.get("custom", {}).get(POSITION)
            last = last if origin is None else places.get(origin, origin)
            yield last, node


def _outputs(traced: GraphModule) -> list[Any]:
    (output,) = traced.graph.find_nodes(op="output")
    return list(output.args[0])
