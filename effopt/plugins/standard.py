"""Runs one pass, and undoes it if it raises or leaves a graph that is not valid.

The built-in rewrites are run by a driver that undoes each match on its own and are held to valid graphs
by conformance tests; a copy is kept for every other pass, and for all of them with `verify="always"`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule

from effopt.errors import EffoptError, InvalidGraphError, PluginError
from effopt.graph.rewrite import PassResult
from effopt.graph.snapshot import Snapshot
from effopt.graph.verify import check_graph
from effopt.passes.base import Context, Pass, Rewrite
from effopt.plugins.hookspec import hookimpl


class RunPass:
    """The plugin that applies passes, one object for each compile call."""

    def __init__(self, origin_of: Callable[[Pass], str], *, always_check: bool = False) -> None:
        """Args: what names the plugin of a pass; whether built-in passes are checked too."""
        self.origin_of, self.always_check = origin_of, always_check

    @hookimpl(trylast=True)
    def effopt_run_pass(self, pass_: Pass, module: GraphModule, context: Context) -> PassResult:
        """Apply the pass. A fault is in the result, with the plugin's name; the graph is then as before."""
        origin = self.origin_of(pass_)
        built_in = origin == "effopt"
        derived = len(context.weights.entries)
        snapshot = (
            None
            if built_in and isinstance(pass_, Rewrite) and not self.always_check
            else Snapshot(module.graph)
        )
        try:
            result = pass_.apply(module, context)
            if not isinstance(result, PassResult):
                raise TypeError(f"apply returned {type(result).__name__}, not a PassResult")
            if self.always_check or not built_in:
                check_graph(module)
        except Exception as error:
            if snapshot is not None:
                snapshot.restore()
                del context.weights.entries[derived:]
            if not pass_.exact:
                # Left out of one graph of a model and not of the others, it would mix two models.
                raise (
                    error if isinstance(error, EffoptError) else PluginError(_say(pass_, origin, error))
                ) from error
            return PassResult(faults=[_say(pass_, origin, error)])
        result.faults = [f"{_named(pass_, origin)}: {fault}" for fault in result.faults]
        return result


def _named(pass_: Pass, origin: str) -> str:
    return f"pass {pass_.name!r} of plugin {origin!r}"


def _say(pass_: Pass, origin: str, error: Exception) -> str:
    what = (
        "left an invalid graph" if isinstance(error, InvalidGraphError) else f"raised {type(error).__name__}"
    )
    return f"{_named(pass_, origin)} {what}: {error}; its changes were undone"
