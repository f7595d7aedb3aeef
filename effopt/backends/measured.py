"""Lowerings measured instead of predicted: each near candidate is compiled as the graph will be, and run.

A candidate is a graph of that one call, handed to Inductor with the settings of the whole graph, so that a
reference is fused and a kernel is launched as it will be. Operands have the node's own shapes, dtypes and
strides, symbols at their hints. Their contents are made up, for nobody knows them yet. In training a run is
forward and backward. Candidates take turns, and the median counts. Whatever fails here leaves the choice to
the predictions: no graph that compiles without measuring fails to compile for it.

Only what is measured is run, on tensors of its own; no state of the program changes, that of random numbers
included.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import operator
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

from effopt.backends import measurements
from effopt.backends.base import Lowering, Measure
from effopt.backends.inductor import compile_graph
from effopt.backends.made_up_operands import made_up_call
from effopt.graph.ops.base import hint, tensor_bytes
from effopt.graph.sources import digest_of_effopt
from effopt.graph.values import val

BUDGET_S = 60.0
"""Seconds that measuring may take for one graph; the last candidate that was begun is finished."""
ROUNDS, ROUNDS_S = 15, 1.0
"""Rounds of one node, fewer (but three) where they would take longer than this."""
LARGEST_BYTES = 2.0**31
"""A call that moves more is not tried: its operands lie beside those of the model."""


@dataclass
class Measurer:
    """Measures the lowerings of one graph."""

    carrying: frozenset[Node] = frozenset()
    """Nodes whose value carries a gradient; none for inference."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Inductor's, of the whole graph."""
    faults: list[str] = field(default_factory=list)
    spent_s: float = 0.0

    def of(self, bound: Mapping[str, Any], result: Any) -> Measure:
        """What `choose` asks about one node, given its arguments by name and its fake value."""
        operands = map_aggregate(dict(bound), val)
        wanted = [name for name, node in bound.items() if node in self.carrying]

        def measure(lowerings: Sequence[Lowering]) -> Mapping[str, float | str] | str:
            return self._ask(lowerings, operands, wanted, result)

        return measure

    def _ask(
        self, lowerings: Sequence[Lowering], operands: Any, wanted: Sequence[str], result: Any
    ) -> Mapping[str, float | str] | str:
        lists = [name for name, value in operands.items() if isinstance(value, (list, tuple)) and value]
        if any(not isinstance(x, int) for name in lists for x in operands[name]):
            return f"{lists[0]} is a list, and made-up operands are single tensors"
        moved = max(
            tensor_bytes([*operands.values(), result]), *(_more_bytes(x, operands, result) for x in lowerings)
        )
        if moved > LARGEST_BYTES:
            return f"a call moves {moved / 2**30:.1f} GiB, and at most {LARGEST_BYTES / 2**30:g} are tried"
        question = self._question(lowerings, operands, wanted)
        known = measurements.recall(question)
        if known is not None:
            return known
        if self.spent_s >= BUDGET_S:
            return f"the {BUDGET_S:g} s that measuring may take for a graph are used up"
        start = time.perf_counter()
        try:
            with _apart(bool(wanted), operands):
                found = _race(lowerings, operands, wanted, result, self.settings)
        except Exception as error:  # noqa: BLE001 - no memory for the operands, or a kernel that fails late
            return _words(error)
        finally:
            self.spent_s += time.perf_counter() - start
        seconds = {name: t for name, t in found.items() if not isinstance(t, str)}
        if len(seconds) < len(found):
            return found
        try:
            return measurements.keep(question, seconds)
        except OSError as error:
            self.faults.append(f"what was measured of lowerings is lost with this process: {error}")
            return seconds

    def _question(
        self, lowerings: Sequence[Lowering], operands: Mapping[str, Any], wanted: Sequence[str]
    ) -> dict[str, Any]:
        """All that an answer depends on, in words."""
        return {
            "op": lowerings[0].op.name,
            "lowerings": {lowering.name: _identity(lowering) for lowering in lowerings},
            "operands": {name: _signature(value) for name, value in operands.items()},
            "gradients": sorted(wanted),
            "settings": {name: _plain(value) for name, value in self.settings.items()},
            "configuration": [_inductor_configuration(), torch.get_float32_matmul_precision()],
            "device": _device(operands),
            "versions": [torch.__version__, _triton_version(), digest_of_effopt()],
        }


def _more_bytes(lowering: Lowering, operands: Any, result: Any) -> float:
    """What a reference holds of its own."""
    rule = lowering.op.reference_bytes if lowering.name == "reference" else None
    return 0.0 if rule is None else rule(operands, result)


def _identity(lowering: Lowering) -> str:
    """Of the code; built-in lowerings are told apart by the digest of all of effopt."""
    source = inspect.getmodule(lowering.call)
    try:
        text = inspect.getsource(source) if source is not None else ""
    except (OSError, TypeError):
        text = ""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _signature(value: Any) -> Any:
    if isinstance(value, Tensor):
        return [str(value.dtype), [hint(n) for n in value.shape], [hint(n) for n in value.stride()]]
    return _plain(hint(value) if isinstance(value, torch.SymInt) else value)


def _plain(value: Any) -> Any:
    """As JSON. What has no plain form is known by its type and all of its text."""
    if isinstance(value, float):
        return repr(value)
    return value if isinstance(value, (bool, int, str, type(None))) else f"{type(value).__qualname__} {value}"


def _inductor_configuration() -> str:
    """Of what is set for the whole process; the options of a graph are in its question one by one."""
    from torch._inductor import config

    return config.get_hash().hex()


def _device(operands: Mapping[str, Any]) -> str:
    device = next((x.device for x in operands.values() if isinstance(x, Tensor)), torch.device("cpu"))
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return (
        f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    )


@functools.cache
def _triton_version() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


@contextmanager
def _apart(training: bool, operands: Mapping[str, Any]) -> Iterator[None]:
    """Compile and run inside a compile call of Dynamo as if outside it, and leave random numbers as they are.

    Dynamo's and AOTAutograd's own state of the outer call is put aside: its fake tensors, its identifier, its
    record of one forward and one backward compilation.
    """
    from torch._dynamo import utils
    from torch._guards import compile_context, tracing

    kept = utils._metrics_context_tls.__dict__
    outer = kept.pop("metrics_context", None)
    devices = {x.device for x in operands.values() if isinstance(x, Tensor) and x.device.type == "cuda"}
    try:
        with (
            tracing(None),
            compile_context(None),
            torch.random.fork_rng(devices),
            torch.set_grad_enabled(training),
        ):
            yield
    finally:
        kept.pop("metrics_context", None)
        if outer is not None:
            kept["metrics_context"] = outer


def _race(
    lowerings: Sequence[Lowering],
    operands: Mapping[str, Any],
    wanted: Sequence[str],
    result: Any,
    settings: Mapping[str, Any],
) -> dict[str, float | str]:
    """Median seconds of each, taking turns; for one that fails, why."""
    made = made_up_call(lowerings[0].op, operands)
    runs: dict[str, Callable[[], Any]] = {}
    found: dict[str, float | str] = {}
    for lowering in lowerings:
        try:
            runs[lowering.name] = _runnable(lowering, made, wanted, result, settings)
            runs[lowering.name]()
        except Exception as error:  # noqa: BLE001 - a kernel that cannot run here is not taken, and says why
            runs.pop(lowering.name, None)
            found[lowering.name] = _words(error)
    device = next((x.device for x in made.values() if isinstance(x, Tensor)), torch.device("cpu"))
    clock = stopwatch(device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for number in range(ROUNDS if runs else 0):
        for name, run in runs.items():
            times[name].append(clock(run))
        if number >= 2 and time.perf_counter() - start > ROUNDS_S:
            break
    return found | {name: max(1e-9, statistics.median(values)) for name, values in times.items()}


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _runnable(
    lowering: Lowering,
    made: Mapping[str, Any],
    wanted: Sequence[str],
    result: Any,
    settings: Mapping[str, Any],
) -> Callable[[], Any]:
    """The call of one lowering, compiled; with a backward pass if operands want gradients."""
    given = {**made, **{name: lay_out(made[name]) for name, lay_out in lowering.prepack.items()}}
    leaves = [given[name].detach().requires_grad_() for name in wanted]
    given |= dict(zip(wanted, leaves, strict=True))
    graph, inputs, named = Graph(), [], {}
    for name, value in given.items():
        if isinstance(value, Tensor):
            inputs.append(value)
            named[name] = graph.placeholder(name)
    call = graph.call_function(lowering.call, (), {**given, **named})
    several = len(result) if isinstance(result, (tuple, list)) else 0
    taken = [graph.call_function(operator.getitem, (call, i)) for i in range(several)] or [call]
    graph.output(tuple(taken))
    # Graphs of CUDA would keep the operands of each candidate for good.
    quiet = {**settings, "triton.cudagraphs": False}
    compiled = compile_graph(GraphModule({}, graph), inputs, quiet, digest_of_effopt())
    if not wanted:
        return lambda: compiled(*inputs)
    upstream = [torch.ones_like(x) for x in compiled(*inputs) if x.requires_grad]

    def both() -> Any:
        outputs = [x for x in compiled(*inputs) if x.requires_grad]
        return torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)

    return both


def stopwatch(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    """Seconds of one run: of the device between two events, its cache emptied first, or of the clock."""
    if device.type != "cuda":

        def by_clock(run: Callable[[], Any]) -> float:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start

        return by_clock
    # Longer than any L2; filling it also lets the host run ahead, so that launches are not what is measured.
    flushed = torch.empty(2**28, dtype=torch.uint8, device=device)

    def by_events(run: Callable[[], Any]) -> float:
        with torch.cuda.device(device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flushed.zero_()
            begin.record()
            run()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) * 1e-3

    return by_events
