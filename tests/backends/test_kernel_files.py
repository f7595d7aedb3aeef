"""Kernels that share a file are Inductor's own: same results, same calls, fewer runs of the C++ compiler."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config
from torch._inductor.async_compile import AsyncCompile, kernel_code_log
from torch._inductor.utils import fresh_cache

from effopt.backends.inductor import _shared_files

if not _shared_files(None):
    pytest.skip("this torch gives a pass after fusion no identity for its cache", allow_module_level=True)
from effopt.backends import kernel_files
from effopt.backends.kernel_files import KernelFiles

_ADD_ONE = """
#include <torch/csrc/inductor/cpp_prefix.h>
extern "C"  void  kernel(const float* in_ptr0,
                       float* out_ptr0,
                       const int64_t ks0)
{
    for(int64_t x0=0; x0<ks0; x0+=1)
    {
        out_ptr0[x0] = in_ptr0[x0] + 1;
    }
}
"""
_ARGUMENTS = ["const float*", "float*", "const int64_t"]


@pytest.fixture
def cache() -> Iterator[Path]:
    with fresh_cache():
        from torch._inductor.runtime.runtime_utils import cache_dir

        yield Path(cache_dir())


def libraries(cache: Path) -> int:
    return len(list(cache.rglob("*.main.so")))


class TwoProducts(nn.Module):
    """Each matmul ends a kernel: three forward, and as many backward."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.down(torch.sigmoid(self.up(torch.sin(x))))) * x


def made(*sources: str) -> list[Any]:
    """The kernels of a module as Inductor writes it."""
    files = KernelFiles()
    scope = {f"k{i}": files.cpp_pybinding(_ARGUMENTS, source) for i, source in enumerate(sources)}
    files.wait(scope)
    return list(scope.values())


@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_graph_is_one_library_forward_and_one_backward(cache: Path, threads: int) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = TwoProducts(), torch.randn(7, 24, requires_grad=True)
    parameters = [x, *model.parameters()]
    with config.patch(compile_threads=threads):
        y = torch.compile(model, backend="effopt")(x)
        assert libraries(cache) == 1
        got = torch.autograd.grad(y.square().sum(), parameters)
        assert libraries(cache) == 2
    wanted = torch.autograd.grad(model(x).square().sum(), parameters)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


def test_a_module_from_the_cache_builds_nothing(cache: Path) -> None:
    model, x = TwoProducts().eval(), torch.randn(7, 24)
    with torch.no_grad(), config.patch(fx_graph_cache=True):
        for _ in range(2):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            torch.testing.assert_close(torch.compile(model, backend="effopt")(x), model(x))
            assert libraries(cache) == 1
    assert torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"] == 1


def test_inductor_without_effopt_is_left_as_it_is(cache: Path) -> None:
    torch._dynamo.reset()
    model, x = TwoProducts().eval(), torch.randn(7, 24)
    with torch.no_grad():
        torch.compile(model, backend="effopt")(x)
        before = libraries(cache)
        torch._dynamo.reset()
        torch.compile(model, backend="inductor")(x)
    assert libraries(cache) - before == 3
    assert AsyncCompile.cpp_pybinding is not KernelFiles.cpp_pybinding
    assert config._post_fusion_custom_pass is None


def test_kernels_keep_their_arguments_and_say_what_is_wrong(cache: Path) -> None:
    one, two = made(_ADD_ONE, _ADD_ONE.replace("+ 1;", "+ 2;"))
    assert libraries(cache) == 1
    x, y = torch.arange(5.0), torch.empty(5)
    for kernel, added in ((one, 1), (two, 2)):
        assert kernel(x, y, 5) is None
        assert y.equal(x + added)
    with pytest.raises(RuntimeError, match="3 args"):
        one(x, y)
    with pytest.raises(RuntimeError, match="expected int arg"):
        one(x, y, x)


@pytest.mark.parametrize(
    "odd",
    [
        _ADD_ONE.replace('extern "C"', 'inline int twice(int a)\n{\n    return 2 * a;\n}\nextern "C"'),
        pytest.param(_ADD_ONE + "inline int twice(int a)\n{\n    return 2 * a;\n}\n", marks=pytest.mark.slow),
        pytest.param(
            _ADD_ONE.replace("{\n    for", "{\n    #define STEP 1\n    for"), marks=pytest.mark.slow
        ),
        _ADD_ONE.replace("cpp_prefix.h>", "cpp_prefix.h>\n#include <cmath>"),
    ],
    ids=["function-before", "function-after", "macro", "header"],
)
def test_more_than_one_plain_function_has_a_file_of_its_own(cache: Path, odd: str) -> None:
    kernels = made(_ADD_ONE, odd, _ADD_ONE.replace("+ 1;", "+ 2;"))
    assert libraries(cache) == 2
    x, y = torch.arange(5.0), torch.empty(5)
    for kernel, added in zip(kernels, (1, 1, 2), strict=True):
        kernel(x, y, 5)
        assert y.equal(x + added)


def test_the_log_has_the_source_of_every_kernel(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`TORCH_LOGS=kernel_code`, as without shared files."""
    with caplog.at_level(logging.INFO, kernel_code_log.name):
        made(_ADD_ONE, _ADD_ONE.replace("+ 1;", "+ 2;"))
    assert "+ 1;" in caplog.text
    assert "+ 2;" in caplog.text


def test_kernels_that_do_not_compile_together_are_compiled_alone(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernel_files, "_bindings", lambda kernels: "#error not together")
    with caplog.at_level(logging.WARNING):
        one, two = made(_ADD_ONE, _ADD_ONE.replace("+ 1;", "+ 2;"))
    assert "one by one" in caplog.text
    x, y = torch.arange(5.0), torch.empty(5)
    one(x, y, 5)
    assert y.equal(x + 1)
    two(x, y, 5)
    assert y.equal(x + 2)


def test_long_kernels_are_spread_over_files() -> None:
    kernels = [kernel_files._Kernel([], "", "\n" * lines) for lines in (10, 400, 10, 300, 280, 5)]
    files = kernel_files._files(kernels)
    assert [k for file in files for k in file] == kernels
    assert [sum(k.function.count("\n") for k in file) for file in files] == [410, 310, 285]
    assert kernel_files._files([]) == []


@pytest.mark.parametrize("how", ["option", pytest.param("configuration", marks=pytest.mark.slow)])
def test_the_users_pass_in_the_same_slot_takes_its_place(cache: Path, how: str) -> None:
    torch._dynamo.reset()
    model, x, calls = TwoProducts().eval(), torch.randn(7, 24), []

    def note(nodes: list[Any]) -> list[Any]:
        calls.append(len(nodes))
        return nodes

    setting = {"_post_fusion_custom_pass": note}
    options = {"inductor": setting} if how == "option" else {}
    with torch.no_grad(), config.patch(setting if how == "configuration" else {}):
        got = torch.compile(model, backend="effopt", options=options)(x)
    assert len(calls) == 1
    assert libraries(cache) == 3
    torch.testing.assert_close(got, model(x))
