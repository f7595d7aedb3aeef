"""The hooks of effopt: eight, for good. A plugin implements those it needs with `effopt.hookimpl`.

Passes, ops and lowerings arrive through the first three, the built-in ones too. The others let a
plugin change a pipeline or watch a compile call; watchers are `wrapper=True` implementations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch.fx import GraphModule

    from effopt.backends.base import Lowering
    from effopt.graph.ops.base import Op
    from effopt.graph.rewrite import Match, PassResult, Replacement
    from effopt.passes.base import Context, Pass

hookspec = pluggy.HookspecMarker("effopt")
hookimpl = pluggy.HookimplMarker("effopt")


@hookspec
def effopt_passes() -> Sequence[type[Pass]]:  # type: ignore[empty-body]
    """Pass classes to register.

    When: once per compile call, while the registry is built. Result: a sequence of `Pass`
    subclasses; two plugins that register one name are an error that names both.
    """


@hookspec
def effopt_ops() -> Sequence[Op]:  # type: ignore[empty-body]
    """Canonical ops to register. When, and name clashes: as `effopt_passes`."""


@hookspec
def effopt_lowerings() -> Sequence[Lowering]:  # type: ignore[empty-body]
    """Lowerings to register, for any op. They compete with the built-in ones by cost."""


@hookspec
def effopt_pipeline(pipeline: list[Pass]) -> None:
    """Change the pipeline of this compile call.

    When: after the user's options were applied, before the order is solved. `pipeline` may be
    changed in place; requirements and conflicts are checked afterwards.
    """


@hookspec
def effopt_compile_start(module: GraphModule, options: Any) -> None:
    """A graph was captured to normal form and the pipeline is about to run. Look, do not change."""


@hookspec(firstresult=True)
def effopt_run_pass(pass_: Pass, module: GraphModule, context: Context) -> PassResult | None:
    """Run one pass.

    When: for each pass in order. The built-in implementation applies it; timing, dumps and graph
    verification are wrappers around it.
    """


@hookspec(firstresult=True)
def effopt_approve_rewrite(pass_: Pass, match: Match, replacement: Replacement) -> str | None:
    """Whether to keep one rewrite: None keeps it, a string is the reason to roll it back.

    When: after the replacement was emitted, before it takes over the uses. The first reason
    decides. Numeric verification and fuel are implementations.
    """


@hookspec
def effopt_compile_end(report: Any) -> None:
    """The compile call is done; `report` is complete and may be stored or shown."""
