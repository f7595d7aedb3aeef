"""Products of two tensors that keep all their dimensions, and what is contracted with them, by letters.

    k[..., :, None] * v[..., None, :]     k: "abcd", v: "abce", the product: "abcde"

However it is spelled (einsum, broadcast multiplication, matmul of single rows), each operand gets a letter
for each of its dimensions: the same letter, the same dimension. Looks only.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses.einsum_letters import letters_of
from effopt.graph.rewrite import require
from effopt.graph.values import shape_of

_aten = torch.ops.aten
_LETTERS = "abcdefgh"
_NEW = "*"
"""A dimension of length 1 that stands for none."""


@dataclass(frozen=True)
class Labelled:
    """A node, and a letter for each of its dimensions."""

    node: Node
    letters: str
    own: str = ""
    """The letter that it shares with the states alone."""

    def of(self, own: str) -> Labelled:
        """With its own letter named."""
        return replace(self, own=own)

    def require(self, letters: Collection[str], at: Node) -> None:
        """Raise `Reject` unless it has just these dimensions."""
        extra = set(self.letters) ^ set(letters)
        require(
            not extra, f"{self.node.name} is broadcast, or its dimensions are not the other operands'", at
        )


def outer_product(node: Node) -> tuple[Labelled, Labelled, str]:
    """The operands of a product, and the letters of its dimensions. Raises `Reject`."""
    if node.target is _aten.einsum.default:
        (first, second), out = _equation(node)
        whole = set(first) | set(second) == set(out)
        require(whole, "the products of keys and values are summed before the cumulative sum", node)
        letters, sides = out, (first, second)
        operands: Any = node.args[1]
        one, other = (Labelled(x, side) for x, side in zip(operands, sides, strict=True))
    else:
        rank = len(shape_of(node))
        letters = _LETTERS[:rank]
        sides = (letters, letters)
        if node.target is _aten.matmul.default:
            sides = (letters[:-1] + _NEW, letters[:-2] + _NEW + letters[-1])
        a, b = node.args[:2]
        one, other = _labelled(a, sides[0]), _labelled(b, sides[1])
    for side in (one, other):
        _require_sizes(side, letters, shape_of(node), node)
    return one, other, letters


def contraction(node: Node, root: Node, states: Node, letters: str, a: Node) -> tuple[Labelled, str]:
    """What `states` are contracted with, and the letters of the result at `root`. Raises `Reject`."""
    if node.target is _aten.einsum.default:
        sides, out = _equation(node)
        operands: Any = node.args[1]
        at = 0 if operands[0] is states else 1
        require(
            len(sides[at]) == len(letters), "the equation does not name all dimensions of the states", node
        )
        there = dict(zip(sides[at], letters, strict=True))
        known = set(sides[1 - at]) | set(out) <= set(there)
        require(known, f"{a.name} has a dimension that the states do not have", node)
        query = Labelled(a, "".join(there[x] for x in sides[1 - at]))
        result = "".join(there[x] for x in out)
    elif node.target is _aten.matmul.default:
        query = _labelled(a, letters[:-2] + _NEW + letters[-2])
        result = letters[:-2] + letters[-1]
    else:
        require(len(shape_of(node)) == len(letters), f"{a.name} enlarges the states", node)
        query = _labelled(a, letters)
        dim = int(root.args[1][0]) % len(letters)  # type: ignore[index, arg-type]
        result = letters[:dim] + letters[dim + 1 :]
        turned = letters[dim] not in query.letters
        require(not turned, "the contracted channel is not that of the query", root)
    _require_sizes(query, letters, shape_of(states), node)
    return query, result


def _equation(node: Node) -> tuple[list[str], str]:
    found = letters_of(str(node.args[0]))
    plain = found is not None and len(found[0]) == 2
    require(plain, f"{node.args[0]} has no letter for each dimension", node)
    assert found is not None
    return found


def _labelled(node: Any, letters: str) -> Labelled:
    """A broadcast operand: new dimensions of length 1 have no letter."""
    rank = len(shape_of(node))
    letters = letters[len(letters) - rank :]
    while node.target is _aten.unsqueeze.default:
        dim = int(node.args[1]) % len(letters)
        letters = letters[:dim] + letters[dim + 1 :]
        node = node.args[0]
    return Labelled(node, letters)


def _require_sizes(side: Labelled, letters: str, sizes: tuple[Any, ...], node: Node) -> None:
    size = dict(zip(letters, sizes, strict=True))
    for letter, own in zip(side.letters, shape_of(side.node), strict=True):
        same = letter in size and statically_known_true(own == size[letter])
        require(same, f"{side.node.name} is broadcast over a dimension of the states", node)
