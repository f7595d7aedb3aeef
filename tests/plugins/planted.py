"""Rules for tests: made from a pattern and a replacement, right ones and wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from effopt.compile import effopt, record
from effopt.passes.base import Rewrite, Stage
from effopt.plugins.report import GraphReport


def rule(name: str, /, pattern: Callable[..., Any], rewrite: Callable[..., Any], **members: Any) -> Rewrite:
    """A rewrite whose `pattern(op, *captures)` and `rewrite(emit, m)` are these functions."""

    def pattern_method(self: Any, op: Any, *captures: Any) -> Any:
        return pattern(op, *captures)

    import inspect

    parameters = list(inspect.signature(pattern).parameters.values())
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    pattern_method.__signature__ = inspect.Signature([own, *parameters])  # type: ignore[attr-defined]
    body: dict[str, Any] = {
        "name": name,
        "stage": Stage.CANONICALIZE,
        "pattern": pattern_method,
        "rewrite": lambda self, emit, m: rewrite(emit, m),
        **members,
    }
    return type("Planted", (Rewrite,), body)()


def compiled(
    model: Callable[..., Any], inputs: Sequence[Any], passes: Any, **options: Any
) -> tuple[GraphReport, Any]:
    """The report of the one graph of `model` under exactly these passes, and what it returned."""
    torch._dynamo.reset()
    options = {"pipeline": passes, "lowering": "eager", **options}
    with record() as report:
        result = torch.compile(model, backend=effopt, options=options, fullgraph=True)(*inputs)
    (graph,) = report.graphs
    return graph, result
