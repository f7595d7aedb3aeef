"""What is wrong with a call is said in the error; what cannot be rewritten runs unchanged, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from effopt.compile import effopt, explain, record
from effopt.errors import OptionError
from effopt.options import Options
from tests.graph.capture_cases import assert_as_in_eager


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8))


def message_of(options: dict[str, Any]) -> str:
    """What the user of `torch.compile` reads."""
    compiled = torch.compile(model(), backend=effopt, options=options)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        compiled(torch.randn(2, 8))
    assert isinstance(caught.value.inner_exception, OptionError)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lowerin": "eager"}, ("unknown option 'lowerin'", "Did you mean 'lowering'?", "Valid: ", "verify")),
        ({"lowering": "fast"}, ("'lowering'", "'fast'", "auto", "eager", "reference")),
        ({"verify": "alway"}, ("Did you mean 'always'?", "first", "off")),
        ({"verify": 3}, ("'verify'", "'3'")),
        ({"plans": {"drop-layers": 1}}, ("'plans'", "effopt.calibrate")),
        ({"plans": "plan.json"}, ("effopt.Plan.load, got 'plan.json' (str)",)),
        ({"release_weights": True}, ("'release_weights'", "no pass of this pipeline replaces any")),
        ({"rtol": 2.0}, ("'rtol' must lie in (0, 1), got 2.0",)),
        ({"rtol": "tight"}, ("'rtol' must be float or int, got 'tight' (str)",)),
        ({"disable": 3}, ("'disable' must be str or list or tuple, got 3 (int)",)),
        ({"disable": [3]}, ("'disable'", "3")),
        ({"outline": "yes"}, ("'outline' must be bool, got 'yes' (str)",)),
        ({"inductor": ["max_autotune"]}, ("'inductor' must be Mapping",)),
        ({"passes": 3}, ("passes must be text, Pass classes or instances, or a list", "got 3 (int)")),
        ({"passes": "fuse-rms-nrm"}, ("unknown pass 'fuse-rms-nrm'", "Valid: ")),
        ({"passes": "a{b"}, ("cannot read pipeline text at",)),
        ({"disable": "no-such-pass"}, ("unknown pass to disable 'no-such-pass'", "Valid: ")),
        ({"plugins": "mine"}, ("'plugins' must be list or tuple",)),
        ({"report": 1}, ("'report' must be str",)),
    ],
    ids=str,
)
def test_options_are_checked(options: dict[str, Any], words: tuple[str, ...]) -> None:
    message = message_of(options)
    for word in words:
        assert word in message


def test_options_are_checked_without_compiling() -> None:
    with pytest.raises(OptionError, match="Did you mean 'passes'"):
        Options.parse({"pases": "x"})


def test_explain_takes_a_model() -> None:
    with pytest.raises(OptionError, match=r"a module or a function of tensors, got 'bert' \(str\)"):
        explain("bert", torch.randn(2, 8))  # type: ignore[arg-type]


def test_nearest_pass_is_named() -> None:
    from effopt.plugins.manager import build_registry

    name = sorted(build_registry().passes)[0]
    assert f"Did you mean {name!r}?" in message_of({"passes": name + "x"})


def test_unknown_option_of_a_pass_is_named() -> None:
    from effopt.plugins.manager import build_registry

    name = sorted(build_registry().passes)[0]
    message = message_of({"passes": f"{name}{{no_such_option=1}}"})
    assert name in message
    assert "no_such_option" in message


class Wrapper(torch.Tensor):
    """A subclass with nothing of its own."""


def sparse() -> tuple[Any, ...]:
    return (torch.eye(4).to_sparse(),)


def subclass() -> tuple[Any, ...]:
    torch.manual_seed(0)
    return (torch.randn(4, 4).as_subclass(Wrapper),)


def two_tensor() -> tuple[Any, ...]:
    from torch.testing._internal.two_tensor import TwoTensor

    return (TwoTensor(torch.ones(4, 4), torch.ones(4, 4)),)


@pytest.mark.parametrize("make", [sparse, subclass, two_tensor])
def test_input_that_is_refused_runs_unchanged(make: Callable[[], tuple[Any, ...]]) -> None:
    def double(x):
        return x * 2

    with record() as report:
        got = torch.compile(double, backend=effopt, options={"lowering": "eager"})(*make())
    expected = double(*make())
    assert type(got) is type(expected)
    assert got.layout == expected.layout
    torch.testing.assert_close(
        torch.Tensor(got.to_dense()) if got.is_sparse else got,
        expected.to_dense() if expected.is_sparse else expected,
    )
    for graph in report.graphs:
        assert "subclass" in graph.refused or "layout" in graph.refused


INPUTS = {
    "transposed": lambda: torch.randn(8, 4).t(),
    "expanded": lambda: torch.randn(1, 8).expand(4, 8),
    "strided": lambda: torch.randn(8, 16)[::2, ::2],
    "offset": lambda: torch.randn(40)[8:].view(4, 8),
    "empty": lambda: torch.randn(0, 8),
    "one": lambda: torch.randn(1, 8),
    "nan": lambda: torch.full((2, 8), float("nan")),
    "inf": lambda: torch.full((2, 8), float("inf")),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", INPUTS)
def test_unusual_inputs(kind: str, grad: bool) -> None:
    def make() -> tuple[Any, ...]:
        torch.manual_seed(1)
        return (INPUTS[kind]().detach().requires_grad_(grad),)

    assert_as_in_eager(model(), make, rtol=1e-5, options={"pipeline": None})


def test_double_precision() -> None:
    def make() -> tuple[Any, ...]:
        return (torch.linspace(-1, 1, 32, dtype=torch.float64).view(4, 8),)

    assert_as_in_eager(model().double(), make, rtol=1e-12, options={"pipeline": None})


def test_complex() -> None:
    def spectrum(x, y):
        return (torch.fft.fft(x) * y).abs(), x @ y.t()

    def make() -> tuple[Any, ...]:
        torch.manual_seed(0)
        return torch.randn(4, 8, dtype=torch.complex64), torch.randn(4, 8, dtype=torch.complex64)

    assert_as_in_eager(spectrum, make, rtol=1e-5, options={"pipeline": None})


def test_meta_device() -> None:
    with torch.device("meta"):
        net, x = nn.Linear(8, 8), torch.empty(2, 8)
    got = torch.compile(net, backend=effopt, options={"lowering": "eager"})(x)
    assert got.device.type == "meta"
    assert got.shape == (2, 8)


def test_numbers_and_nothing_as_inputs() -> None:
    def mixed(x, scale, count, flag, nothing, words):
        y = x * scale + count
        return y if flag and nothing is None else -y, words["add"] + x, count + 1

    for scale, count in ((2.0, 3), (2.5, 3), (2.5, 4), (0.1, 7)):
        assert_as_in_eager(
            mixed, lambda s=scale, c=count: (torch.ones(3), s, c, True, None, {"add": torch.ones(3)})
        )


def replace_weight(net: nn.Module) -> None:
    net[0].weight = nn.Parameter(torch.ones(8, 8))


def swap_data(net: nn.Module) -> None:
    net[0].weight.data = torch.full((8, 8), 0.5)


def write_data(net: nn.Module) -> None:
    with torch.no_grad():
        net[0].weight.mul_(-1)


def load(net: nn.Module) -> None:
    net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()})


def replace_module(net: nn.Module) -> None:
    net[1] = nn.ReLU()


def cast(net: nn.Module) -> None:
    net.double()


def freeze(net: nn.Module) -> None:
    net.requires_grad_(False)


def to_evaluation(net: nn.Module) -> None:
    net.eval()


@pytest.mark.parametrize(
    "change", [replace_weight, swap_data, write_data, load, replace_module, cast, freeze, to_evaluation]
)
def test_model_changed_after_compilation(change: Callable[[nn.Module], None]) -> None:
    net, same = model(), model()
    compiled = torch.compile(net, backend=effopt, options={"lowering": "eager"})
    x = torch.linspace(-1, 1, 16).view(2, 8)
    torch.testing.assert_close(compiled(x), same(x), rtol=1e-5, atol=1e-6)
    change(net)
    change(same)
    x = x.to(same[0].weight.dtype)
    got, expected = compiled(x), same(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert got.requires_grad == expected.requires_grad
