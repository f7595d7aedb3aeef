"""A function of the user's, named as `package.module:function` or `path/to/file.py:function`, and called."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from effopt.errors import EffoptError, OptionError, unknown


def made_by(name: str) -> Any:
    """What the function that `name` names returns, called without arguments.

    Modules are found as by `python -m` in the working directory, files and what they import as by `python
    FILE`.

    Raises:
        OptionError: no such file, module or function; an import or a function that fails, and where. An
            EffoptError of the function is raised as it is.
    """
    place, _, function_name = name.rpartition(":")
    is_file = place.endswith(".py")
    if is_file and not Path(place).is_file():
        raise OptionError(f"there is no file {place!r}, which MODEL {name!r} names")
    with _import_path(str(Path(place).resolve().parent) if is_file else os.getcwd()):
        try:
            module = _run_file(Path(place)) if is_file else importlib.import_module(place)
        except ImportError as error:
            raise OptionError(f"cannot import {place!r} for MODEL {name!r}: {error}") from error
        function = getattr(module, function_name, None)
        if not callable(function):
            raise unknown(f"function in {place}", function_name, _functions(module) or ["(it has none)"])
        try:
            return function()
        except EffoptError:
            raise
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise OptionError(
                f"{name} raised {type(error).__name__}: {error} ({last.filename}:{last.lineno})"
            ) from error


def told(made: Any) -> str:
    """What a function returned, as its types: `(Linear, tuple)`."""
    if not isinstance(made, tuple):
        return type(made).__name__
    return f"({', '.join(type(member).__name__ for member in made)})"


@contextmanager
def _import_path(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _run_file(path: Path) -> ModuleType:
    """The file as a module under its full path, a name that no other module has."""
    name = str(path.resolve())
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, "a name that ends in .py has a loader"
    assert spec.loader is not None, "and so has its specification"
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _functions(module: ModuleType) -> list[str]:
    own = [n for n, v in vars(module).items() if getattr(v, "__module__", None) == module.__name__]
    return [n for n in own if callable(getattr(module, n)) and not n.startswith("_")]
