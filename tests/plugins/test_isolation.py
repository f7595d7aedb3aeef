"""A plugin or a pass that fails is named, what it did is undone, and the others go on."""

from __future__ import annotations

import importlib.metadata
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch.fx import GraphModule

import effopt.plugins.manager as manager
from effopt.compile import effopt, record
from effopt.errors import PluginError
from effopt.graph.rewrite import PassResult, require
from effopt.passes.base import Context, GraphPass, Pass, Stage
from effopt.plugins.hookspec import hookimpl
from effopt.plugins.manager import build_registry
from tests.plugins.planted import rule

aten = torch.ops.aten


def model(x: torch.Tensor) -> torch.Tensor:
    return (x.relu() * 2).sigmoid()


def run(**options: Any) -> Any:
    x = torch.randn(4, 4)
    with record() as report:
        result = torch.compile(
            model, backend=effopt, options={"lowering": "eager", "pipeline": "", **options}
        )(x)
    torch.testing.assert_close(result, model(x))
    return report


def clamp(name: str = "good", **members: Any) -> Pass:
    made = rule(name, lambda op, x: op.relu(x), lambda e, m: e(aten.clamp_min.default, m.x, 0))
    return type("Clamp", (type(made),), members)()


@dataclass(frozen=True)
class Breaks(GraphPass):
    """Changes the graph, and then does something wrong."""

    name: ClassVar[str] = "breaks"
    stage: ClassVar[Stage] = Stage.CANONICALIZE
    how: str = "raises"

    def apply(self, module: GraphModule, context: Context) -> PassResult:
        graph = module.graph
        (sigmoid,) = graph.find_nodes(op="call_function", target=aten.sigmoid.default)
        (relu,) = graph.find_nodes(op="call_function", target=aten.relu.default)
        (output,) = graph.find_nodes(op="output")
        with graph.inserting_before(sigmoid):
            extra = graph.call_function(aten.tanh.default, (relu,))
            extra.meta["val"] = relu.meta["val"]
        sigmoid.replace_all_uses_with(extra)
        graph.erase_node(sigmoid)
        if self.how == "raises":
            raise ValueError("no such thing")
        if self.how == "no value":
            del extra.meta["val"]
        elif self.how == "writes":
            extra.target = aten.tanh_.default
        elif self.how == "order":
            output.append(extra)
        elif self.how == "returns":
            return None  # type: ignore[return-value]
        elif self.how == "dangling":
            graph._erased = extra  # type: ignore[attr-defined]
            other = torch.fx.Graph()
            extra.args = (other.placeholder("stranger"),)
        elif self.how == "unknown":
            extra.target = run
        return PassResult()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raises", "raised ValueError: no such thing"),
        ("returns", "not a PassResult"),
        ("no value", "no fake value"),
        ("writes", "writes in place"),
        ("order", "ends in its one output"),
        ("dangling", "another graph"),
        ("unknown", "neither an op"),
    ],
)
def test_a_pass_that_fails_is_undone(how: str, words: str) -> None:
    report = run(pipeline=[Breaks(how), clamp()])
    (fault,) = report.faults
    assert "'breaks'" in fault
    assert words in fault
    assert report.counts == {"good": 1}


@pytest.mark.parametrize("stage", ["legal", "rewrite", "pattern"])
def test_a_rule_that_raises_costs_its_match_only(stage: str) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("typo")

    report = run(pipeline=[clamp("bad", **{stage: broken}), clamp()])
    assert report.counts == {"good": 1}
    (fault,) = report.faults
    assert "'bad'" in fault
    assert "KeyError" in fault
    if stage != "pattern":
        assert any("KeyError" in r.reason for r in report.rejected)


def test_a_full_match_is_never_refused_in_silence() -> None:
    def illegal(self: Any, m: Any) -> None:
        require(False, "not today", m.root)

    report = run(pipeline=[clamp("strict", legal=illegal)])
    (refusal,) = report.rejected
    assert refusal.reason == "not today"


def plugin(**hooks: Callable[..., Any]) -> Any:
    module = types.ModuleType("third_party")
    for name, function in hooks.items():
        setattr(module, name, function)
    return module


def raising(names: str, wrapper: bool = False, late: bool = False) -> Any:
    """A hook implementation of those arguments that raises, at once or after the inner call."""
    body = (
        "    raise RuntimeError('boom')\n    yield\n"
        if not late
        else "    yield\n    raise RuntimeError('boom')\n"
    )
    if not wrapper:
        body = "    raise RuntimeError('boom')\n"
    space: dict[str, Any] = {}
    exec(f"def hook({names}):\n{body}", space)
    return hookimpl(wrapper=wrapper)(space["hook"])


@pytest.mark.parametrize(
    ("hook", "names", "wrapper", "late"),
    [
        ("effopt_pipeline", "pipeline", False, False),
        ("effopt_compile_start", "module, options", False, False),
        ("effopt_compile_end", "report", False, False),
        ("effopt_run_pass", "pass_", False, False),
        ("effopt_run_pass", "pass_", True, False),
        ("effopt_run_pass", "pass_, module", True, True),
        ("effopt_approve_rewrite", "match", False, False),
        ("effopt_approve_rewrite", "match", True, True),
    ],
)
def test_a_hook_that_raises(hook: str, names: str, wrapper: bool, late: bool) -> None:
    report = run(pipeline=[clamp()], plugins=[plugin(**{hook: raising(names, wrapper, late)})])
    assert report.counts == {"good": 1}
    assert report.graphs[0].checks, "the built-in check ran"
    (fault,) = report.faults
    assert "'third_party'" in fault
    assert hook in fault
    assert "RuntimeError: boom" in fault


def test_a_pipeline_hook_that_leaves_garbage() -> None:
    @hookimpl
    def effopt_pipeline(pipeline: list[Any]) -> None:
        pipeline.append("not a pass")

    report = run(pipeline=[clamp()], plugins=[plugin(effopt_pipeline=effopt_pipeline)])
    assert report.counts == {"good": 1}
    assert "'not a pass'" in report.faults[0]


def provides(hook: str, value: Any) -> Any:
    return plugin(**{hook: hookimpl(lambda: value)})


class Stolen(Breaks):
    """Takes a built-in name."""

    name: ClassVar[str] = "recognize-rms-norm"


@pytest.mark.parametrize(
    ("hook", "value", "words"),
    [
        ("effopt_passes", ["garbage"], "not a Pass class"),
        ("effopt_passes", [Breaks("raises")], "not a Pass class"),
        ("effopt_passes", 3, "TypeError"),
        ("effopt_ops", [torch.nn.ReLU], "not an Op"),
        ("effopt_lowerings", [None], "not a Lowering"),
        ("effopt_passes", [Stolen], "registered by 'effopt' already"),
        ("effopt_passes", [Breaks, Breaks], "two passes"),
    ],
)
def test_registering_garbage(hook: str, value: Any, words: str) -> None:
    registry = build_registry([provides(hook, value)])
    (fault,) = registry.faults
    assert "'third_party'" in fault
    assert words in fault
    assert "recognize-rms-norm" in registry.passes
    assert "breaks" not in registry.passes


def test_two_plugins_with_one_name_are_both_named() -> None:
    first, second = provides("effopt_passes", [Breaks]), provides("effopt_passes", [Breaks])
    first.__name__, second.__name__ = "first", "second"
    registry = build_registry([first, second])
    (fault,) = registry.faults
    assert "'first'" in fault
    assert "'second'" in fault
    assert registry.origin["breaks"] == "first"


def test_a_hook_that_does_not_exist() -> None:
    @hookimpl
    def effopt_pases() -> None:
        """A misspelt hook."""

    registry = build_registry([plugin(effopt_pases=effopt_pases)])
    (fault,) = registry.faults
    assert "'third_party'" in fault
    assert "effopt_pases" in fault


class Unmarked:
    def effopt_compile_start(self, graph: Any) -> None:
        """Never called: `hookimpl` is missing."""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("my_package.my_module", "'my_package.my_module' has no hook; there are: effopt_approve_rewrite"),
        (Unmarked, "Unmarked is a class; give an instance of it"),
        (Unmarked(), "'effopt_compile_start' is not marked with effopt.hookimpl"),
    ],
    ids=["text", "class", "unmarked"],
)
def test_a_plugin_that_would_do_nothing(given: Any, words: str) -> None:
    (fault,) = build_registry([given]).faults
    assert words in fault


@pytest.fixture
def broken_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = importlib.metadata.EntryPoint("broken", "no_such_module_anywhere", manager.GROUP)
    monkeypatch.setattr(manager, "_entry_points", lambda: (entry,))


def test_a_plugin_that_cannot_be_imported(broken_entry_point: None) -> None:
    report = run(pipeline=[clamp()])
    assert report.counts == {"good": 1}
    assert any("'broken'" in f and "no_such_module_anywhere" in f for f in report.faults)


def test_a_fault_of_the_built_ins_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("boom")

    monkeypatch.setattr(manager.builtin, "effopt_passes", broken)
    with pytest.raises(PluginError, match=r"effopt's own passes, .*boom"):
        build_registry()
