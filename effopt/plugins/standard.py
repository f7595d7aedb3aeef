"""The default behaviour of the pipeline hooks: apply the pass, check the graph it leaves."""

from __future__ import annotations

from torch.fx import GraphModule

from effopt.graph.rewrite import PassResult
from effopt.passes.base import Context, Pass
from effopt.plugins.hookspec import hookimpl


@hookimpl(trylast=True)
def effopt_run_pass(pass_: Pass, module: GraphModule, context: Context) -> PassResult:
    """Apply the pass."""
    return pass_.apply(module, context)
