"""The pipeline: text form, order, and what cannot be ordered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import GraphModule

from effopt import pipeline as pipelines
from effopt.errors import OptionError, PipelineError
from effopt.graph.rewrite import PassResult
from effopt.passes.base import Context, GraphPass, Pass, Stage, option
from effopt.plugins.manager import Registry, build_registry


def make(name: str, stage: Stage = Stage.FUSE, **members: Any) -> type[Pass]:
    def apply(self: Pass, module: GraphModule, context: Context) -> PassResult:
        return PassResult()

    return type(name, (GraphPass,), {"name": name, "stage": stage, "apply": apply, **members})


def names(*passes: type[Pass]) -> list[str]:
    return [p.name for p in pipelines.order([p.build({}) for p in passes])]


@dataclass(frozen=True)
class Rich(GraphPass):
    """One option of every kind."""

    name: ClassVar[str] = "rich"
    stage: ClassVar[Stage] = Stage.QUANTIZE
    exact: ClassVar[bool] = False
    bits: int = option(4, "bits", choices=(2, 4, 8))
    ratio: float = option(0.5, "kept share", min=0.0, max=1.0)
    fast: bool = option(False, "whether")
    kind: str = option("even", "how")
    layers: tuple[int, ...] = option((), "which")

    def apply(self, module: GraphModule, context: Context) -> PassResult:
        return PassResult()


@pytest.fixture(scope="module")
def registry() -> Registry:
    found = build_registry()
    found.passes["rich"] = Rich
    return found


def test_stages_first_then_requirements() -> None:
    late, early = make("late", Stage.FINISH), make("early", Stage.CANONICALIZE)
    first, second = make("first", provides=("fact",)), make("second", requires=("fact",))
    assert names(late, second, first, early) == ["early", "first", "second", "late"]
    assert names(make("b", after=("a",)), make("a")) == ["a", "b"]
    assert names(make("b"), make("a")) == ["b", "a"], "otherwise as given"


def test_a_cycle_is_named() -> None:
    with pytest.raises(PipelineError, match="cycle") as caught:
        names(make("a", after=("c",)), make("b", after=("a",)), make("c", after=("b",)))
    assert all(name in str(caught.value) for name in "abc")


def test_a_conflict_is_named() -> None:
    with pytest.raises(PipelineError, match="left and right conflict"):
        names(make("left", conflicts=("right",)), make("right"))


def test_a_missing_requirement_is_named() -> None:
    with pytest.raises(PipelineError, match="needy requires 'calibration'"):
        names(make("needy", requires=("calibration",)))


def test_a_requirement_of_a_later_stage() -> None:
    with pytest.raises(PipelineError, match=r"early \(CANONICALIZE\).*late \(FINISH\)"):
        names(make("early", Stage.CANONICALIZE, after=("late",)), make("late", Stage.FINISH))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("recognize-rms-nrom", "Did you mean 'recognize-rms-norm'"),
        ("rich{bit=4}", "Did you mean 'bits'"),
        ("rich{bits=5}", r"one of \[2, 4, 8\]"),
        ("rich{ratio=1.5}", r"lie in \[0.0, 1.0\]"),
        ("rich{bits=four}", "must be int"),
        ("rich{fast=1}", "must be bool"),
        ("rich{bits}", "key=value"),
        ("rich bits", "cannot read pipeline text"),
        ("rich{bits=4,bits=8}", "'bits' is given twice"),
        ("rich{bits=2},rich{bits=8}", r"rich\{bits=2\} and rich\{bits=8\} were both asked for"),
    ],
)
def test_bad_text(registry: Registry, text: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        pipelines.build(registry, passes=text)


@pytest.mark.parametrize("wrong", [Rich(bits=5), Rich(ratio=2), Rich(layers=("a",))])  # type: ignore[arg-type]
def test_options_of_instances_are_checked(registry: Registry, wrong: Rich) -> None:
    with pytest.raises(OptionError, match="rich: option"):
        pipelines.build(registry, passes=wrong)
    with pytest.raises(OptionError, match="rich: option"):
        pipelines.build(registry, pipeline=[wrong])


@pytest.mark.parametrize("form", [lambda p: p, lambda p: p()], ids=["class", "instance"])
def test_a_pass_without_a_name_is_an_error(registry: Registry, form: Callable[[type[Pass]], Any]) -> None:
    class Nameless(GraphPass):
        stage: ClassVar[Stage] = Stage.CLEANUP

        def apply(self, module: GraphModule, context: Context) -> PassResult:
            return PassResult()

    with pytest.raises(OptionError, match=r"pass class Nameless has no `name`, such as"):
        pipelines.build(registry, passes=form(Nameless))


def test_disable_names_a_pass(registry: Registry) -> None:
    with pytest.raises(OptionError, match="Did you mean 'recognize-rms-norm'"):
        pipelines.build(registry, disable=["recognise-rms-norm"])
    built = pipelines.build(registry, disable=["recognize-rms-norm"])
    assert "recognize-rms-norm" not in [p.name for p in built]


def test_lossy_passes_run_only_when_asked_for(registry: Registry) -> None:
    assert "rich" not in [p.name for p in pipelines.build(registry)]
    assert "rich" in [p.name for p in pipelines.build(registry, passes="rich")]


def test_the_default_pipeline_reads_its_own_text(registry: Registry) -> None:
    built = pipelines.build(registry)
    assert pipelines.build(registry, pipeline=pipelines.text_of(built)) == built


words = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=8).filter(
    lambda w: w not in ("true", "false", "nan", "inf", "infinity") and w.strip("_")
)


@given(
    st.builds(
        Rich,
        bits=st.sampled_from([2, 4, 8]),
        ratio=st.floats(0, 1),
        fast=st.booleans(),
        kind=words,
        layers=st.lists(st.integers(-3, 99), max_size=4).map(tuple),
    )
)
def test_specs_round_trip(given_pass: Rich) -> None:
    registry = build_registry()
    registry.passes["rich"] = Rich
    (again,) = pipelines.resolve(given_pass.spec(), registry)
    assert again == given_pass
    assert {f.name for f in dataclasses.fields(again)} == {"bits", "ratio", "fast", "kind", "layers"}


def test_identity_for_caches_holds_options_and_source() -> None:
    assert Rich().fingerprint() == Rich(bits=4).fingerprint()
    assert Rich().fingerprint() != Rich(bits=8).fingerprint()
    typed_at_a_prompt = type("Typed", (Rich,), {"__module__": "a_prompt"})
    assert typed_at_a_prompt().fingerprint() != Rich().fingerprint()
