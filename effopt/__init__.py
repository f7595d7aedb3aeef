"""effopt: compiler-style graph optimisation passes for PyTorch.

    compiled = torch.compile(model, backend="effopt")
    report = effopt.explain(model, *inputs)

The names below are loaded when they are first used; `import effopt` itself does nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effopt.backends.base import Lowering as Lowering
    from effopt.cache_edits import rerotate as rerotate
    from effopt.caches import cache_for as cache_for
    from effopt.calibration import calibrate as calibrate
    from effopt.compile import explain as explain
    from effopt.compile import record as record
    from effopt.errors import CaptureRefused as CaptureRefused
    from effopt.errors import CheckFailed as CheckFailed
    from effopt.errors import EffoptError as EffoptError
    from effopt.errors import InvalidGraphError as InvalidGraphError
    from effopt.errors import OptionError as OptionError
    from effopt.errors import PipelineError as PipelineError
    from effopt.errors import PlanError as PlanError
    from effopt.errors import PluginError as PluginError
    from effopt.errors import ReleasedWeightError as ReleasedWeightError
    from effopt.errors import UnexpectedOps as UnexpectedOps
    from effopt.graph.kept_blocks import forget_blocks as forget_blocks
    from effopt.graph.ops.base import Op as Op
    from effopt.graph.ops.base import Sample as Sample
    from effopt.graph.ops.base import op as op
    from effopt.graph.pattern import any_of as any_of
    from effopt.graph.pattern import chain as chain
    from effopt.graph.pattern import number as number
    from effopt.graph.pattern import tensor as tensor
    from effopt.graph.rewrite import Emit as Emit
    from effopt.graph.rewrite import Match as Match
    from effopt.graph.rewrite import PassResult as PassResult
    from effopt.graph.rewrite import require as require
    from effopt.options import Options as Options
    from effopt.passes.base import Context as Context
    from effopt.passes.base import Example as Example
    from effopt.passes.base import GraphPass as GraphPass
    from effopt.passes.base import Pass as Pass
    from effopt.passes.base import Rewrite as Rewrite
    from effopt.passes.base import Stage as Stage
    from effopt.passes.base import option as option
    from effopt.passes.plan import Plan as Plan
    from effopt.passes.region import RegionPass as RegionPass
    from effopt.passes.site import Site as Site
    from effopt.passes.site import SitePass as SitePass
    from effopt.plugins.expect import expect as expect
    from effopt.plugins.hookspec import hookimpl as hookimpl
    from effopt.plugins.report import Report as Report
    from effopt.prepacking import PackedPrefill as PackedPrefill
    from effopt.prepacking import prepack as prepack
    from effopt.tuning.report import TuningReport as TuningReport
    from effopt.tuning.tune import tune as tune

_HOMES = {
    "effopt.backends.base": ("Lowering",),
    "effopt.cache_edits": ("rerotate",),
    "effopt.caches": ("cache_for",),
    "effopt.calibration": ("calibrate",),
    "effopt.compile": ("explain", "record"),
    "effopt.errors": (
        "CaptureRefused",
        "CheckFailed",
        "EffoptError",
        "InvalidGraphError",
        "OptionError",
        "PipelineError",
        "PlanError",
        "PluginError",
        "ReleasedWeightError",
        "UnexpectedOps",
    ),
    "effopt.graph.kept_blocks": ("forget_blocks",),
    "effopt.graph.ops.base": ("Op", "Sample", "op"),
    "effopt.graph.pattern": ("any_of", "chain", "number", "tensor"),
    "effopt.graph.rewrite": ("Emit", "Match", "PassResult", "require"),
    "effopt.options": ("Options",),
    "effopt.passes.base": (
        "Context",
        "Example",
        "GraphPass",
        "Pass",
        "Rewrite",
        "Stage",
        "option",
    ),
    "effopt.passes.plan": ("Plan",),
    "effopt.passes.region": ("RegionPass",),
    "effopt.passes.site": ("Site", "SitePass"),
    "effopt.plugins.expect": ("expect",),
    "effopt.plugins.hookspec": ("hookimpl",),
    "effopt.plugins.report": ("Report",),
    "effopt.prepacking": ("PackedPrefill", "prepack"),
    "effopt.tuning.report": ("TuningReport",),
    "effopt.tuning.tune": ("tune",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'effopt' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
