"""The testing kit finds what is planted for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from effopt.backends.base import Lowering
from effopt.graph import ops
from effopt.graph.pattern import ANY
from effopt.graph.rewrite import require
from effopt.passes.base import Example, Rewrite, Stage, option
from effopt.testing import assert_equivalent, check_lowering, check_pass

aten = torch.ops.aten


@dataclass(frozen=True)
class Good(Rewrite):
    """relu(x) -> clamp_min(x, 0). Source: arithmetic."""

    name: ClassVar[str] = "good"
    stage: ClassVar[Stage] = Stage.CANONICALIZE

    def pattern(self, op: Any, x: Any) -> Any:
        return op.softmax(op.mul(x, 2.0), -1)

    def rewrite(self, emit: Any, m: Any) -> Any:
        return emit(aten._softmax.default, emit(aten.add.Tensor, m.x, m.x), -1, False)

    def samples(self) -> Iterable[Example]:
        yield Example(lambda x: (x * 2.0).softmax(-1), (torch.randn(3, 3),))

    def refusals(self) -> Iterable[Example]:
        yield Example(lambda x: (x * 3.0).softmax(-1), (torch.randn(3, 3),), reason="expected 2.0")

    def anchors(self, pattern: Any) -> tuple[Any, ...]:
        return (aten.softmax.int,)


class AnyDimension(Good):
    """Does not look at the dimension. Source: arithmetic."""

    name: ClassVar[str] = "any-dimension"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.softmax(op.mul(x, 2.0), ANY)


class AnyDimensionOfPlaces(AnyDimension):
    """Its sample begins with a call without operands. Source: arithmetic."""

    name: ClassVar[str] = "any-dimension-of-places"

    def samples(self) -> Iterable[Example]:
        yield Example(lambda x: ((x + torch.arange(3)) * 2.0).softmax(-1), (torch.randn(3, 3),))


class AnyLetters(Good):
    """Does not look at the equation. Source: arithmetic."""

    name: ClassVar[str] = "any-letters"

    def pattern(self, op: Any, x: Any, y: Any) -> Any:
        return op.einsum(ANY, [x, y])

    def rewrite(self, emit: Any, m: Any) -> Any:
        return emit(aten.matmul.default, m.x, m.y)

    def samples(self) -> Iterable[Example]:
        yield Example(lambda x, y: torch.einsum("mk,kn->mn", x, y), (torch.randn(3, 3), torch.randn(3, 3)))

    def anchors(self, pattern: Any) -> tuple[Any, ...]:
        return (aten.einsum.default,)


class Alone(AnyLetters):
    """No change of its sample fits the sizes. Source: arithmetic."""

    name: ClassVar[str] = "alone"

    def pattern(self, op: Any, x: Any, y: Any) -> Any:
        return op.mm(x, y)

    def samples(self) -> Iterable[Example]:
        yield Example(torch.mm, (torch.randn(3, 4), torch.randn(4, 5)))

    def anchors(self, pattern: Any) -> tuple[Any, ...]:
        return (aten.mm.default,)


class AnyFactor(Good):
    """Does not look at the factor. Source: arithmetic."""

    name: ClassVar[str] = "any-factor"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.softmax(op.mul(x, ANY), -1)


class Wrong(Good):
    """Emits something else. Source: arithmetic."""

    name: ClassVar[str] = "wrong"

    def rewrite(self, emit: Any, m: Any) -> Any:
        return emit(aten._softmax.default, m.x, -1, False)


class Detached(Good):
    """Cuts the gradient. Source: arithmetic."""

    name: ClassVar[str] = "detached"

    def rewrite(self, emit: Any, m: Any) -> Any:
        return emit(
            aten.detach.default, emit(aten._softmax.default, emit(aten.add.Tensor, m.x, m.x), -1, False)
        )


class Restless(Good):
    """Matches what it emits. Source: arithmetic."""

    name: ClassVar[str] = "restless"

    def rewrite(self, emit: Any, m: Any) -> Any:
        return emit(aten.softmax.int, emit(aten.mul.Tensor, m.x, 2.0), -1)


class Lazy(Good):
    """Never fires. Source: arithmetic."""

    name: ClassVar[str] = "lazy"

    def legal(self, m: Any) -> None:
        require(False, "not today", m.root)


class OtherReason(Good):
    """Refuses for another reason than it says. Source: arithmetic."""

    name: ClassVar[str] = "other-reason"

    def refusals(self) -> Iterable[Example]:
        yield Example(lambda x: (x * 3.0).softmax(-1), (torch.randn(3, 3),), reason="the moon is full")


class Uncited(Good):
    """Says nothing of where it comes from."""

    name: ClassVar[str] = "uncited"


@dataclass(frozen=True)
class Undocumented(Good):
    """Has an option nobody explains. Source: arithmetic."""

    name: ClassVar[str] = "undocumented"
    bits: int = 4


@dataclass(frozen=True)
class Documented(Good):
    """Has an option that is explained. Source: arithmetic."""

    name: ClassVar[str] = "documented"
    bits: int = option(4, "bits a weight")


def test_a_good_pass() -> None:
    done = check_pass(Good)
    assert (done.samples, done.refusals, done.variants) == (1, 1, 5)
    assert done.mutants >= 3
    assert not done.skipped
    check_pass(Documented(bits=8), mutate=False)


@pytest.mark.parametrize(
    ("pass_", "words"),
    [
        (AnyDimension, "look-alike with .*dim is 0"),
        (AnyDimensionOfPlaces, "look-alike with .*dim is 0"),
        (AnyLetters, "look-alike with .*equation is mk,kn->nm"),
        (Alone, "none of 1 changes to its samples runs: .*operands exchanged"),
        (AnyFactor, "look-alike with .*other is"),
        (Wrong, "check failed"),
        (Detached, "gradients"),
        (Restless, "second run changes the graph"),
        (Lazy, "did not fire"),
        (OtherReason, "no reason holds 'the moon is full'"),
        (Uncited, "cites no source"),
        (Undocumented, "option 'bits' has no documentation"),
    ],
)
def test_what_is_wrong_is_found(pass_: type[Rewrite], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_pass(pass_)


def _norm(
    x: Tensor, weight: Tensor, eps: float, *, weight_offset: float = 0.0, round_first: bool = False
) -> Tensor:
    return ops.rms_norm.reference(x, weight, 2 * eps, weight_offset=weight_offset, round_first=round_first)


def _lowering(call: Any, **members: Any) -> Lowering:
    def supports(target: Any, operands: Any) -> str | None:
        return None if operands["weight"] is not None else "needs a weight"

    return Lowering(ops.rms_norm, "planted", call, supports, lambda *_: 0.0, **members)


def test_check_lowering() -> None:
    done = check_lowering(_lowering(ops.rms_norm.reference))
    assert done.compared == done.gradients > 0
    assert set(done.refused) == {"needs a weight"}
    with pytest.raises(AssertionError, match="float64"):
        check_lowering(_lowering(_norm))
    cut = _lowering(lambda *a, **k: ops.rms_norm.reference(*a, **k).detach())
    with pytest.raises(AssertionError, match="gradient 0"):
        check_lowering(cut, dtypes=[torch.float32])
    check_lowering(_lowering(cut.call, differentiable=False), dtypes=[torch.float32])


def test_assert_equivalent() -> None:
    x = torch.randn(4, 4, requires_grad=True)
    assert_equivalent(torch.relu, lambda v: v.clamp_min(0), [x])
    with pytest.raises(AssertionError, match="result 0: relative error"):
        assert_equivalent(torch.relu, torch.abs, [x])
    with pytest.raises(AssertionError, match="gradient of input 0"):
        assert_equivalent(torch.sigmoid, lambda v: v.sigmoid().detach() + 0 * v, [x])
    with pytest.raises(AssertionError, match="NaN"):
        assert_equivalent(lambda v: v, lambda v: v / (v != 0) * torch.tensor(float("nan")), [x])
    assert_equivalent(lambda v: v.add_(1), lambda v: v + 1, [torch.zeros(3)])
