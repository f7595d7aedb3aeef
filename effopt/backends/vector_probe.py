"""Whether this machine's compiler and PyTorch take vector instructions, told without test programs.

In an empty cache directory, Inductor builds and loads a program around PyTorch's vector headers for each
instruction set that an x86 processor has: some 8 s of processor time on one with AMX, before the first
kernel. What these programs find out is whether the compiler knows the intrinsics of the headers, which its
version tells, and whether the library exports the vector functions that they call. Inductor still asks the
processor for its flags, and still builds its small programs for VNNI, bfloat16 and AMX.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import subprocess
import sys
from pathlib import Path

import torch

SETTING = "cpp.vec_isa_ok"
"""Inductor's setting that answers in place of the programs; None has it ask them."""

# With AVX-512 and its bfloat16 whole, by their release notes; what is older is left to the programs.
_OLDEST = {"__clang_major__": 12, "__GNUC__": 10}
_FUNCTIONS = ("Sleef_expf8_u10", "Sleef_expf16_u10")  # of AVX2 and of AVX-512


@functools.cache
def takes_vectors(compiler: str) -> bool:
    """Whether to trust `compiler` and this PyTorch with AVX2 and AVX-512; False if that is not known."""
    is_known = sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")
    return is_known and _is_new(compiler) and _exports_functions()


def _is_new(compiler: str) -> bool:
    command = [compiler, "-dM", "-E", "-x", "c++", "/dev/null"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return False
    macros = dict(line.split(" ", 2)[1:] for line in said.splitlines() if line.count(" ") >= 2)
    # Clang says that it is an old GCC besides.
    name = next((name for name in _OLDEST if name in macros), None)
    return name is not None and macros[name].isdecimal() and int(macros[name]) >= _OLDEST[name]


def _exports_functions() -> bool:
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    except OSError:
        return False
    return all(hasattr(library, name) for name in _FUNCTIONS)
