"""The C++ kernels of a graph, compiled in few files instead of in one each.

    kernel 0 -> g++ -> library 0, ..., kernel n -> g++ -> library n   =>   kernels 0..n -> g++ -> library

Inductor hands each kernel to the C++ compiler in a file of its own, and a file costs far more than a
kernel: with torch 2.13 and g++ 12, about 0.45 s of processor time for the templates of Inductor's header,
the binding and the link, and 0.05 s for a kernel of Llama. Here the kernels of a module share files.
Their source, the compiler's flags, the cache of libraries and the calling convention stay Inductor's.

A module that Inductor writes makes its kernels with an object of class `AsyncCompile`; one more import
in it puts `KernelFiles` under that name. So a module that comes from Inductor's cache does the same, and
nothing of torch is replaced.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch._inductor.async_compile import AsyncCompile, get_compile_threads, kernel_code_log
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.custom_graph_pass import CustomSchedulerPass, get_hash_for_files
from torch._inductor.exc import CppCompileError
from torch._inductor.graph import SubgraphLowering
from torch._inductor.virtualized import V

_log = logging.getLogger(__name__)

_PREFIX = "#include <torch/csrc/inductor/cpp_prefix.h>\n"
_FUNCTION = re.compile(
    rf'\s*{re.escape(_PREFIX)}extern "C" +void +kernel(\([^(){{}}]*\)\s*\{{\n.*\n\}})\s*', re.S
)
_LINES_A_FILE = 500
"""So much source takes about as long as what each file costs before its first kernel."""


class ShareFiles(CustomSchedulerPass):
    """Has the module that Inductor is about to write use `KernelFiles`. The schedule stays as it is."""

    def __call__(self, nodes: list[Any]) -> list[Any]:
        graph = V.graph
        # A subgraph writes its kernels into the module of the whole graph, which is scheduled as well.
        if not graph.cpp_wrapper and not isinstance(graph, SubgraphLowering) and "cpu" in graph.device_types:
            graph.wrapper_code.add_import_once(f"from {__name__} import KernelFiles as AsyncCompile")
        return nodes

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


@dataclass(frozen=True)
class _Kernel:
    """A kernel that waits for its library."""

    arguments: Sequence[str]
    """C++ types."""
    source: str
    """As Inductor wrote it."""
    function: str
    """Parameters and body of its only function."""


class KernelFiles(AsyncCompile):
    """Makes the kernels of one module. Anything but one plain function has a file of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: list[_Kernel] = []

    def cpp_pybinding(self, argtypes: list[str], source_code: str) -> Any:
        """What `wait` replaces by the kernel, or the kernel."""
        found = _FUNCTION.fullmatch(source_code)
        if found is None or "\n}" in found[1][:-2] or "#define" in found[1]:
            return super().cpp_pybinding(argtypes, source_code)
        kernel_code_log.info("CPP+Bindings Kernel:\n%s", source_code)
        kernel = _Kernel(argtypes, source_code, found[1])
        self._waiting.append(kernel)
        return kernel

    def wait(self, scope: dict[str, Any]) -> None:
        """Build the libraries, and put the kernels that `scope` waits for in their places."""
        submit = self.submit if get_compile_threads() > 1 else None
        started = [(kernels, _Library.load(kernels, submit)) for kernels in _files(self._waiting)]
        self._waiting = []
        made: dict[int, Any] = {}
        for kernels, library in started:
            made.update(zip(map(id, kernels), self._functions(kernels, library), strict=True))
        for name, value in scope.items():
            if isinstance(value, _Kernel):
                scope[name] = made[id(value)]
        super().wait(scope)

    def _functions(self, kernels: Sequence[_Kernel], library: Callable[[], Any]) -> Sequence[Any]:
        try:
            return library().kernels()
        except CppCompileError as error:
            _log.warning(
                "%d kernels are compiled one by one, for they do not together: %s", len(kernels), error
            )
            return [super(KernelFiles, self).cpp_pybinding(list(k.arguments), k.source) for k in kernels]


def _files(kernels: Sequence[_Kernel]) -> list[list[_Kernel]]:
    """The kernels of each file, in order, of about equal length."""
    lines = [k.function.count("\n") for k in kernels]
    count = -(-sum(lines) // _LINES_A_FILE)
    files: list[list[_Kernel]] = [[] for _ in range(count)]
    before = 0
    for kernel, length in zip(kernels, lines, strict=True):
        files[(before + length // 2) * count // sum(lines)].append(kernel)
        before += length
    return [file for file in files if file]


class _Library(CppPythonBindingsCodeCache):
    """A library of several kernels. Its module has one function, which returns the bound kernels."""

    entry_function = "kernels"

    @classmethod
    def load(cls, kernels: Sequence[_Kernel], submit: Callable[..., Any] | None) -> Callable[[], Any]:
        """Start the build; what is returned waits for its end and returns the module."""
        functions = [f'extern "C" void kernel_{i}{k.function}\n' for i, k in enumerate(kernels)]
        binding = cls.suffix_template.format(
            arg_len=0,
            call_entry_func="return all_kernels();",
            entry_func=cls.entry_function,
            extra_parse_arg=_bindings(kernels),
        )
        return cls.load_async("\n".join([_PREFIX, *functions, binding]), submit_fn=submit)


def _bindings(kernels: Sequence[_Kernel]) -> str:
    """A Python function for each kernel, and `all_kernels`, which returns all of them."""
    bound = "\n".join(_binding(i, kernel) for i, kernel in enumerate(kernels))
    table = "\n".join(f'    {{"kernel_{i}", call_{i}, METH_VARARGS, ""}},' for i in range(len(kernels)))
    return f"""
template <typename Call> static PyObject* checked(PyObject* args, Py_ssize_t count, Call call) {{
    try {{
        if (!PyTuple_CheckExact(args) || PyTuple_GET_SIZE(args) != count) [[unlikely]]
            throw std::runtime_error("a tuple of " + std::to_string(count) + " args required");
        call();
        Py_RETURN_NONE;
    }} catch (std::exception const& e) {{
        PyErr_SetString(PyExc_RuntimeError, e.what());
    }} catch (...) {{
        PyErr_SetString(PyExc_RuntimeError, "unhandled error");
    }}
    return nullptr;
}}
{bound}
static PyMethodDef bound_kernels[] = {{
{table}
}};
static PyObject* all_kernels() {{
    PyObject* all = PyTuple_New({len(kernels)});
    for (Py_ssize_t i = 0; all != nullptr && i < {len(kernels)}; i++) {{
        PyObject* one = PyCFunction_New(&bound_kernels[i], nullptr);
        if (one == nullptr) {{
            Py_CLEAR(all);
            break;
        }}
        PyTuple_SET_ITEM(all, i, one);
    }}
    return all;
}}
"""


def _binding(index: int, kernel: _Kernel) -> str:
    types = [argument.replace("const ", "") for argument in kernel.arguments]
    values = ", ".join(f"parse_arg<{t}>(args, {i})" for i, t in enumerate(types))
    call = f"return checked(args, {len(types)}, [&] {{ kernel_{index}({values}); }});"
    return f"static PyObject* call_{index}(PyObject* self, PyObject* args) {{ {call} }}"
