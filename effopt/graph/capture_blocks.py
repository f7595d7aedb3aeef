"""Equal blocks of a Dynamo graph are brought to normal form once, and copied.

Tracing costs the same for every layer, so a deep model pays for each of its equal layers. Here the
repeated blocks are cut out: one copy is traced as a graph of its own, the rest of the model is traced
with the blocks' results as inputs and their operands as outputs, and the pieces are put together in
program order. The result is the graph that tracing everything gives, node for node.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from effopt.graph.analyses.blocks import Run, blocks, operand_groups, operands, results
from effopt.graph.values import val

Export = Callable[[GraphModule, list[Any]], tuple[GraphModule, Any]]

_POSITION = "effopt_position"
_LEAST_SAVED = 40  # nodes; below that, two traces cost more than one
_OWN_META = ("stack_trace", "source_fn_stack", "from_node")


@dataclass
class _Piece:
    """One run of equal blocks, traced."""

    run: Run
    groups: list[list[tuple[int, int]]]
    returned: list[int]
    body: GraphModule
    first_input: int = 0
    """Position, among the outer graph's inputs, of the first result of the first copy."""
    first_output: int = 0
    """Position, among the outer graph's outputs, of the first operand of the first copy."""


def export_in_blocks(
    module: GraphModule, inputs: Sequence[Any], export: Export
) -> tuple[GraphModule, Any] | None:
    """Trace `module` with its equal blocks traced once.

    Args:
        module: Dynamo's graph. Only read, but for `val`, which is added to its nodes' metadata.
        inputs: its inputs.
        export: traces a graph functionally: (module, inputs) -> (graph, signature).

    Returns:
        What `export(module, inputs)` would return; None if there is nothing to gain, or if an operand
        or a result of a block is written in place anywhere: which of its values a block reads depends
        on when, and the pieces are put together by value.
    """
    calls = [n for n in module.graph.nodes if n.op in ("call_function", "call_method")]
    for node in module.graph.nodes:
        if "example_value" in node.meta:
            node.meta["val"] = node.meta["example_value"]
    barriers = frozenset(n for n in calls if not _is_plain(n))
    carrying = frozenset(n for n in calls if isinstance(val(n), torch.Tensor) and val(n).requires_grad)
    runs = [r for r in blocks(module.graph, barriers, carrying).runs if r.saved_nodes >= _LEAST_SAVED]
    if not runs:
        return None
    if any(_is_written(source) for run in runs for source in _sources(run)):
        return None
    for position, node in enumerate(module.graph.nodes):
        node.meta["custom"] = {**node.meta.get("custom", {}), _POSITION: position}
    pieces = []
    for run in runs:
        groups, returned = operand_groups(run), results(run)
        body, signature = export(*_body(module, run.instances[0], groups, returned))
        if signature.user_inputs_to_mutate or signature.buffers_to_mutate:
            return None
        pieces.append(_Piece(run, groups, returned, body))
    outer_module, fakes = _outer(module, pieces)
    outer, signature = export(outer_module, [*inputs, *fakes])
    placeholders = [n.name for n in outer.graph.find_nodes(op="placeholder")]
    if any(name in placeholders[len(inputs) :] for name in signature.user_inputs_to_mutate.values()):
        return None
    return _join(module, outer, pieces, len(inputs), len(signature.user_inputs_to_mutate)), signature


def _is_plain(node: Node) -> bool:
    """A call that computes tensors, or fills one: no change of global state, no size, no foreign region."""
    value = val(node)
    if node.target is operator.setitem:
        return True  # a block that fills a tensor of its own is functional; of others, it is refused below
    tensors = value if isinstance(value, (tuple, list)) else (value,)
    return all(isinstance(t, torch.Tensor) for t in tensors) and not isinstance(
        node.target, torch._ops.HigherOrderOperator
    )


def _sources(run: Run) -> Iterator[Node]:
    """What the copies of a block read from outside."""
    for instance in run.instances:
        inside = set(instance)
        yield from (s for node in instance for s in operands(node) if s not in inside)


def _is_written(node: Node) -> bool:
    """Whether a value is written in place, itself or through a view: Dynamo's fake tensor counted it."""
    value = val(node)
    if not isinstance(value, torch.Tensor):
        return False
    return value.is_inference() or value._version > 0


def _fake(node: Node) -> Any:
    value = val(node)
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


def _body(
    module: GraphModule, instance: Sequence[Node], groups: list[list[tuple[int, int]]], returned: list[int]
) -> tuple[GraphModule, list[Any]]:
    graph, env, fakes = Graph(), dict[Node, Node](), list[Any]()
    for k, (i, j) in enumerate(group[0] for group in groups):
        source = operands(instance[i])[j]
        fakes.append(_fake(source))
        # Two operands may be one node in this copy, and not in another: each has a placeholder.
        env[source] = graph.placeholder(f"operand_{k}")
    slots = {slot: k for k, group in enumerate(groups) for slot in group}
    parameters = list(graph.find_nodes(op="placeholder"))
    for i, node in enumerate(instance):
        index = iter(range(len(operands(node))))

        def place(operand: Node, i: int = i, index: Iterator[int] = index) -> Node:
            slot = (i, next(index))
            return parameters[slots[slot]] if slot in slots else env[operand]

        args, kwargs = map_arg((node.args, node.kwargs), place)
        env[node] = graph.create_node(node.op, node.target, args, kwargs)
        env[node].meta = dict(node.meta)
    graph.output(tuple(env[instance[i]] for i in returned))
    return GraphModule(module, graph), fakes


def _outer(module: GraphModule, pieces: list[_Piece]) -> tuple[GraphModule, list[Any]]:
    """The graph without the blocks: their results are inputs, their operands are outputs."""
    graph, env, fakes = Graph(), dict[Node, Node](), list[Any]()
    inside = {n for piece in pieces for instance in piece.run.instances for n in instance}
    for node in module.graph.find_nodes(op="placeholder"):
        env[node] = graph.node_copy(node)
    count = len(env)
    for piece in pieces:
        piece.first_input = count + len(fakes)
        for instance in piece.run.instances:
            for offset in piece.returned:
                env[instance[offset]] = graph.placeholder(f"result_{len(fakes)}")
                fakes.append(_fake(instance[offset]))
    for node in module.graph.nodes:
        if node not in inside and node.op not in ("placeholder", "output"):
            env[node] = graph.node_copy(node, lambda n: env[n])
    (output,) = module.graph.find_nodes(op="output")
    values = [*map_arg(output.args[0], lambda n: env[n])]
    for piece in pieces:
        piece.first_output = len(values)
        for instance in piece.run.instances:
            values += [env[operands(instance[group[0][0]])[group[0][1]]] for group in piece.groups]
    graph.output(tuple(values))
    return GraphModule(module, graph), fakes


def _join(
    module: GraphModule, outer: GraphModule, pieces: list[_Piece], inputs: int, written: int
) -> GraphModule:
    """Copy all pieces into one graph, in the order of the program."""
    joiner = _Joiner(list(module.graph.nodes), outer, pieces, inputs, written)
    (output,) = module.graph.find_nodes(op="output")
    joiner.copy_all()
    values = joiner.outer_outputs[: written + len(output.args[0])]
    joiner.joined.graph.output(tuple(map_arg(values, lambda n: joiner.value(_OUTER, 0, n))))
    joiner.joined.recompile()
    return joiner.joined


_OUTER = -1


class _Joiner:
    """Copies traced nodes on demand. A node is named by its piece (or `_OUTER`), its copy, and itself."""

    def __init__(
        self, program: list[Node], outer: GraphModule, pieces: list[_Piece], inputs: int, written: int
    ) -> None:
        self.program = program
        self.position = {node: i for i, node in enumerate(program)}
        self.outer, self.pieces = outer, pieces
        self.joined = GraphModule(torch.nn.Module(), Graph())
        self.outer_outputs = _outputs(outer)
        self.env: dict[tuple[int, int, Node], Node] = {}
        self._operands: dict[tuple[int, int, Node], Any] = {}
        self._results: dict[Node, tuple[int, int, Any]] = {}
        parameters = list(outer.graph.find_nodes(op="placeholder"))
        for node in parameters[:inputs]:
            self.env[_OUTER, 0, node] = self.joined.graph.node_copy(node)
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
            else:
                self.env[key] = self._copy(k, c, node)
        return self.env[key]

    def _copy(self, k: int, c: int, node: Node) -> Node:
        made = self.joined.graph.node_copy(node, lambda operand: self.value(k, c, operand))
        if node.op == "get_attr":
            holder = self.outer if k == _OUTER else self.pieces[k].body
            made.target = self._attribute(k, str(node.target), getattr(holder, str(node.target)))
        made.meta = dict(node.meta)
        custom = dict(made.meta.pop("custom", {}))
        position = custom.pop(_POSITION, None)
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
            origin = node.meta.get("custom", {}).get(_POSITION)
            last = last if origin is None else places.get(origin, origin)
            yield last, node


def _outputs(traced: GraphModule) -> list[Any]:
    (output,) = traced.graph.find_nodes(op="output")
    return list(output.args[0])
