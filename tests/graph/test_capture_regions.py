"""Higher-order operators, custom ops, gradient modes, graph breaks: left alone, or refused with a reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.graph.capture_cases import MODES, assert_as_in_eager, make

pytestmark = [
    # Dynamo asks a non-leaf tensor for its gradient when a frame resumes, and instantiates the context of
    # an autograd function; torch warns about both.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


class Triple(torch.autograd.Function):
    """Its backward is not the derivative of its forward, so that losing it shows."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x * factor, x.sum()

    @staticmethod
    def backward(ctx, grad, grad_sum):
        (x,) = ctx.saved_tensors
        return grad * 3 * x + grad_sum, None


class Regions(nn.Module):
    """One higher-order operator in each method."""

    def __init__(self, body: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = body
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return getattr(self, self.body)(x)

    def autograd_function(self, x):
        y, total = Triple.apply(self.linear(x), 2.0)
        return y.sin() + total

    def two_autograd_functions(self, x):
        return Triple.apply(Triple.apply(x, 2.0)[0] + 1, 3.0)[0] @ self.linear.weight

    def checkpointed(self, x):
        return checkpoint(lambda t: self.linear(t).sin(), x.cos(), use_reentrant=False) * 2

    def cond(self, x):
        return torch.cond(x.sum() > 0, lambda t: self.linear(t), lambda t: t.cos() * 2, (x * 2,)) + 1

    def cond_in_no_grad(self, x):
        with torch.no_grad():
            y = torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (x * 2,))
        return y * self.linear(x)


BODIES = [name for name, v in vars(Regions).items() if callable(v) and name[0] != "_" and name != "forward"]


@pytest.mark.parametrize("mode", ["grad", "no_grad"])
@pytest.mark.parametrize("body", BODIES)
def test_left_alone(body: str, mode: str) -> None:
    assert_as_in_eager(Regions(body), make((3, 4), grad=True), around=MODES[mode], graphs=1)


@pytest.mark.parametrize("body", ["autograd_function", "checkpointed", "cond"])
def test_left_alone_through_inductor(body: str) -> None:
    assert_as_in_eager(Regions(body), make((3, 4), grad=True), lowering="auto", rtol=1e-5)


@torch.compiler.nested_compile_region
def _region(x, weight):
    return (x @ weight).sin()


def test_nested_compile_region() -> None:
    def twice(x, w):
        return _region(_region(x, w) + 1, w)

    assert_as_in_eager(twice, make((3, 4), (4, 4)), around=torch.no_grad, graphs=1)
    # torch has no eager backward of invoke_subgraph: only a compiler's.
    assert_as_in_eager(twice, make((3, 4), (4, 4), grad=True), lowering="auto", rtol=1e-5, graphs=1)


def test_region_that_writes_statistics() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return checkpoint(self.norm, x, use_reentrant=False)

    # Eager itself cannot take gradients of this: the statistics were overwritten before they are read again.
    assert_as_in_eager(Model(), make((3, 4)), refused="writes in place", calls=1, gradients_too=False)


def test_map() -> None:
    from torch._higher_order_ops.map import map as hop_map

    assert_as_in_eager(lambda x, y: hop_map(lambda row, other: row * other, x, y), make((3, 4), (4,)))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    def soft_cap(score, b, h, q, k):
        return torch.tanh(score / 5) * 5

    # Without a block mask it makes an empty one by vmap.
    assert_as_in_eager(
        lambda q, k, v: flex_attention(q, k * 2, v, score_mod=soft_cap),
        make(*[(1, 2, 16, 8)] * 3),
        rtol=1e-5,
        refused="torch.func transform",
    )


def test_vmap_is_refused() -> None:
    assert_as_in_eager(
        torch.func.vmap(lambda row: row.sin().sum()), make((3, 4)), refused="torch.func transform"
    )


@torch.library.custom_op("effopt_test_capture::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x):
    return torch.empty_like(x)


twice.register_autograd(lambda ctx, grad: grad * 5)


@torch.library.custom_op("effopt_test_capture::bump", mutates_args=("x",))
def bump(x: torch.Tensor) -> None:
    x.add_(1)


def test_custom_op() -> None:
    assert_as_in_eager(lambda x: twice(x.sin()) + 1, make((3, 4), grad=True), graphs=1)


def test_custom_op_that_writes() -> None:
    assert_as_in_eager(lambda x: (bump(x), x.sin())[1], make((3, 4)), around=torch.no_grad, calls=2)


def test_enable_grad_in_no_grad() -> None:
    def nested(x):
        with torch.no_grad():
            y = x * 2
            with torch.enable_grad():
                z = x * 3 + y
        return y, z + y

    assert_as_in_eager(nested, make((3, 4), grad=True), graphs=1)
    assert_as_in_eager(nested, make((3, 4), grad=True), around=torch.no_grad, refused="enable_grad")


def test_buffer_written_in_no_grad() -> None:
    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("steps", torch.tensor(0))

        def forward(self, x):
            y = self.linear(x)
            with torch.no_grad():
                self.mean.lerp_(y.mean(0), 0.1)
                self.steps += 1
            return y - self.mean

    assert_as_in_eager(Average(), make((3, 4), grad=True), calls=3)


def test_graph_break_gives_two_graphs() -> None:
    def broken(x, y):
        z = x.sin() * y
        torch._dynamo.graph_break()
        return z.cos() + y

    assert_as_in_eager(broken, make((3, 4), (3, 4), grad=True), graphs=2)


def test_branch_on_data() -> None:
    def branching(x):
        y = x * 2
        if y.sum() > 0:
            return y.sin()
        return y.cos()

    for sign in (1, -1):
        assert_as_in_eager(branching, lambda sign=sign: (sign * torch.ones(3, 4),), graphs=2)
