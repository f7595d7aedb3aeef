"""Which symbolic sizes a graph can know from its inputs."""

from __future__ import annotations

import torch
from torch.fx import Graph

from effopt.graph.values import val


def unbound_symbols(graph: Graph) -> set[str]:
    """Symbols in the sizes of a graph that no input has as a size of its own: `n + 1` alone gives no `n`.

    Inductor writes a subgraph's sizes from its operands, and cannot solve for a symbol.
    """
    read: set[str] = set()
    has_compound = False
    # By whether a tensor has it, or it is an operand itself.
    given: dict[bool, set[str]] = {True: set(), False: set()}
    for node in graph.nodes:
        value = val(node)
        is_tensor = isinstance(value, torch.Tensor)
        shaped = [*value.shape, *value.stride()] if is_tensor else [value]
        symbolic = [size for size in shaped if isinstance(size, torch.SymInt)]
        read.update(str(symbol) for size in symbolic for symbol in size.node.expr.free_symbols)
        if node.op == "placeholder":
            given[is_tensor].update(str(size.node.expr) for size in symbolic if size.node.expr.is_symbol)
            has_compound |= any(not size.node.expr.is_symbol for size in symbolic)
    # It reads the operands in order: `n + 1` may come before the tensor that has `n`.
    if not has_compound:
        given[False] |= given[True]
    return read - given[False]
