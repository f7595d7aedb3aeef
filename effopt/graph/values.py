"""What a node computes: its fake value, and fake evaluation of new calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Node
from torch.fx.node import map_aggregate

MUTATED = "mutated"
"""Key in the metadata of a graph's output: positions of the inputs whose new values come first in it."""


def val(node: Any) -> Any:
    """The fake value of a node, or the value itself if it is not a node."""
    return node.meta.get("val") if isinstance(node, Node) else node


def shape_of(node: Any) -> tuple[Any, ...]:
    """Sizes of a tensor node; `()` for anything else. Sizes may be symbolic."""
    value = val(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def is_floating(node: Any) -> bool:
    """Whether a node is a real floating-point tensor."""
    value = val(node)
    return isinstance(value, torch.Tensor) and value.dtype.is_floating_point


def fake_mode_of(values: Any) -> FakeTensorMode | None:
    """The fake mode of the first fake tensor in a nest of values."""
    found: list[FakeTensorMode] = []

    def look(value: Any) -> Any:
        if isinstance(value, FakeTensor):
            found.append(value.fake_mode)
        return value

    map_aggregate(values, look)
    return found[0] if found else None


def fake_call(
    target: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], like: Any = None
) -> Any:
    """Evaluate a call on the fake values of its operands. Shapes only: nothing is computed.

    `like` is a node, or a fake value, of the same graph, for calls without an operand (`arange`).
    """
    fake_args = map_aggregate(args, val)
    fake_kwargs = map_aggregate(dict(kwargs), val)
    mode = fake_mode_of((fake_args, fake_kwargs, val(like)))
    with torch.no_grad(), mode or nullcontext(), enable_python_dispatcher():
        return target(*fake_args, **fake_kwargs)
