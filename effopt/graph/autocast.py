"""Autocast made explicit: the casts it would make become nodes, and the graph runs with it off.

Before capture each call is tagged with the autocast state in which it would run, ambient or of a
region; after it, the casts are found by running the call on fake tensors in that state and watching
what reaches the kernels. A call whose casts cannot be written on its operands refuses the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import TorchDispatchMode

from effopt.errors import CaptureRefused
from effopt.graph.values import fake_call, fake_mode_of, val

_aten = torch.ops.aten
_ENTER = torch.amp.autocast_mode._enter_autocast
_EXIT = torch.amp.autocast_mode._exit_autocast
_TAG = "effopt_autocast"
_DEVICES = ("cpu", "cuda", "xpu", "mps")
_IGNORED = {_aten._to_copy.default, _aten.detach.default, _aten.alias.default}

State = tuple[tuple[str, torch.dtype], ...]
"""The device types for which autocast is on, each with its dtype."""


def ambient() -> State:
    """The state that the calling code runs in."""
    return tuple((d, torch.get_autocast_dtype(d)) for d in _DEVICES if torch.is_autocast_enabled(d))


def has_regions(module: GraphModule) -> bool:
    """Whether a Dynamo graph enters or leaves autocast."""
    return any(n.op == "call_function" and n.target in (_ENTER, _EXIT) for n in module.graph.nodes)


def is_on(module: GraphModule) -> bool:
    """Whether any part of a Dynamo graph runs under autocast."""
    return bool(ambient()) or has_regions(module)


@contextmanager
def in_state(state: State) -> Iterator[None]:
    """Run in exactly `state`, without the cache of casts."""
    on = dict(state)
    with ExitStack() as stack:
        for device in _DEVICES:
            if device in on or torch.is_autocast_enabled(device):
                dtype = on.get(device, torch.get_autocast_dtype(device))
                stack.enter_context(torch.autocast(device, dtype, enabled=device in on, cache_enabled=False))
        yield


@contextmanager
def traced(module: GraphModule) -> Iterator[None]:
    """Tag every call of a Dynamo graph with its state, and make its regions take effect in the trace.

    The tracer records the calls that enter and leave a region but does not make them, which would
    leave wrong dtypes in the graph. They are replaced, in place, by calls that it does not see.
    """
    states: dict[Node, State] = {}
    current = ambient()
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is _ENTER:
            states[node] = current
            current = _entered(current, node)
            node.target = _enter
        elif node.op == "call_function" and node.target is _EXIT:
            current = states[node.args[0]]
            node.target = _leave
        elif node.op.startswith("call_"):
            node.meta["custom"] = {**node.meta.get("custom", {}), _TAG: current}
    module.recompile()
    was_cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with in_state(ambient()):
            yield
    finally:
        torch.set_autocast_cache_enabled(was_cached)
        while _open:
            _leave(_open[-1])


_open: list[torch.autocast] = []


def _enter(device: str, dtype: torch.dtype | None, enabled: bool, cache: bool | None) -> torch.autocast:
    region = torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
    region.__enter__()
    _open.append(region)
    return region


def _leave(region: torch.autocast) -> None:
    _open.remove(region)
    region.__exit__(None, None, None)


def _entered(current: State, node: Node) -> State:
    device, dtype, enabled = (*node.args, None, True)[:3] if len(node.args) < 3 else node.args[:3]
    others = tuple(entry for entry in current if entry[0] != device)
    if not enabled:
        return others
    chosen = dtype or torch.get_autocast_dtype(str(device))
    return (*others, (str(device), chosen))  # type: ignore[arg-type]


@dataclass
class _Casts:
    """The casts that autocast would cache: those of float32 leaves that ask for a gradient."""

    leaves: frozenset[Node]
    made: dict[tuple[Node, torch.dtype], Node] = field(default_factory=dict)


def make_casts_explicit(module: GraphModule, inputs: Sequence[Any]) -> None:
    """Write the casts of every tagged call as `_to_copy` nodes. Edits `module`; values stay as they are.

    Args:
        module: captured under `traced`.
        inputs: its real inputs.

    Raises:
        CaptureRefused: naming the op whose casts cannot be written on its operands.
    """
    pairs = zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True)
    shared = _Casts(frozenset(node for node, value in pairs if _is_cached(value)))
    for node in list(module.graph.nodes):
        state: State = (node.meta.get("custom") or {}).get(_TAG, ())
        if "custom" in node.meta:
            node.meta["custom"] = {k: v for k, v in node.meta["custom"].items() if k != _TAG}
        if not state or node.op != "call_function":
            continue
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureRefused(f"{node.target} under autocast")
        if isinstance(node.target, torch._ops.OpOverload):
            _cast_operands(node, state, shared)
    module.recompile()


def _cast_operands(node: Node, state: State, shared: _Casts) -> None:
    eligible = [operand for operand in node.all_input_nodes if _is_eligible(operand, state)]
    if not eligible:
        return
    with in_state(state):
        wanted = _watch(node, {})
    lower = dict(state)[val(eligible[0]).device.type]
    plans: list[dict[Node, torch.dtype]] = [
        {},
        wanted.casts,
        dict.fromkeys(eligible, lower),
        dict.fromkeys(eligible, torch.float32),
    ]
    for plan in plans:
        with in_state(()):
            if _watch(node, plan).calls == wanted.calls:
                for operand, dtype in plan.items():
                    if val(operand).dtype != dtype:
                        node.replace_input_with(operand, _cast(node, operand, dtype, shared))
                return
    raise CaptureRefused(f"{node.target} makes casts under autocast that cannot be written on its operands")


def _is_eligible(operand: Node, state: State) -> bool:
    value = val(operand)
    if not isinstance(value, Tensor):
        return False
    return value.device.type in dict(state) and value.is_floating_point() and value.dtype != torch.float64


def _is_cached(value: Any) -> bool:
    is_leaf = isinstance(value, Tensor) and value.is_leaf and value.requires_grad
    return is_leaf and value.dtype == torch.float32 and not value._is_view()


def _cast(node: Node, operand: Node, dtype: torch.dtype, shared: _Casts) -> Node:
    if (operand, dtype) in shared.made:
        return shared.made[operand, dtype]
    with node.graph.inserting_before(node):
        made = node.graph.call_function(_aten._to_copy.default, (operand,), {"dtype": dtype})
    kept = ("nn_module_stack", "stack_trace", "no_grad")
    made.meta.update({k: v for k, v in node.meta.items() if k in kept})
    with in_state(()):
        made.meta["val"] = fake_call(_aten._to_copy.default, (operand,), {"dtype": dtype})
    # One cast has one gradient, summed in its own dtype, as with the cache of autocast.
    if operand in shared.leaves:
        shared.made[operand, dtype] = made
    return made


@dataclass
class _Watched(TorchDispatchMode):
    """What reaches the kernels: calls with their dtypes, and casts of the operands themselves."""

    operands: dict[int, Node]
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    casts: dict[Node, torch.dtype] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is _aten._to_copy.default and id(args[0]) in self.operands:
            self.casts[self.operands[id(args[0])]] = result.dtype
        if func not in _IGNORED and func.namespace != "prim":
            is_view = any(r.alias_info is not None for r in func._schema.returns)
            # A cast commutes with a view, so the dtype at which a view is taken says nothing.
            dtypes = () if is_view else (*_dtypes((args, kwargs or {})), *_dtypes(result))
            self.calls.append((func, *dtypes))
        return result


def _dtypes(nest: Any) -> tuple[torch.dtype, ...]:
    found: list[torch.dtype] = []

    def look(value: Any) -> Any:
        if isinstance(value, Tensor):
            found.append(value.dtype)
        return value

    map_aggregate(nest, look)
    return tuple(found)


def _watch(node: Node, casts: dict[Node, torch.dtype]) -> _Watched:
    """Run a call on the fake values of its operands, cast as told, in the current state."""
    values: dict[Node, Any] = {operand: val(operand) for operand in node.all_input_nodes}
    for operand, dtype in casts.items():
        values[operand] = fake_call(_aten._to_copy.default, (operand,), {"dtype": dtype})
    watched = _Watched({id(values[operand]): operand for operand in values})
    args, kwargs = map_aggregate((node.args, node.kwargs), lambda a: values[a] if isinstance(a, Node) else a)
    mode = fake_mode_of((args, kwargs)) or nullcontext()
    with torch.no_grad(), mode, enable_python_dispatcher(), watched:
        node.target(*args, **kwargs)  # type: ignore[operator]
    return watched
