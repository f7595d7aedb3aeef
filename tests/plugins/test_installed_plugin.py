"""A third-party plugin as users have it: installed, found by its entry point, used without being named.

`make test` installs tests/plugin_package. Without that, it is installed here, into a folder of the test.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tests" / "plugin_package"

USE = """
import json, sys, torch
from effopt.compile import effopt, record
def model(x): return torch.relu(x).pow(2) + 1
x = torch.randn(4, 4)
found = []
for options in json.loads(sys.argv[1]):
    torch._dynamo.reset()
    with record() as report:
        result = torch.compile(model, backend="effopt", options=options)(x)
    torch.testing.assert_close(result, model(x))
    found.append({"counts": report.counts, "ops": report.ops, "faults": report.faults,
                  "kernels": [r.kernel for r in report.lowerings]})
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which the plugin is installed."""
    names = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    if "effopt-squared-relu" in names:
        return dict(os.environ)
    target = tmp_path_factory.mktemp("installed")
    # A copy: building leaves folders beside the sources.
    source = shutil.copytree(PACKAGE, tmp_path_factory.mktemp("source") / PACKAGE.name)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True, cwd=target)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), str(ROOT)])}


def use(environment: dict[str, str], *options: dict[str, object]) -> list[dict[str, Any]]:
    command = [sys.executable, "-c", USE, json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return list(json.loads(done.stdout.strip().splitlines()[-1]))


def test_it_is_used_without_being_named(installed: dict[str, str]) -> None:
    eager, disabled, compiled = use(
        installed, {"lowering": "eager"}, {"lowering": "eager", "disable": ["recognize-squared-relu"]}, {}
    )
    assert eager["counts"] == {"recognize-squared-relu": 1}
    assert eager["ops"] == {"squared_relu": 1}
    assert eager["kernels"] == ["reference"]
    assert disabled["counts"] == {}
    assert compiled["kernels"] == ["clamped"], "its lowering competes with the reference of its op"
    assert not any(found["faults"] for found in (eager, disabled, compiled))


def test_its_fault_is_isolated(installed: dict[str, str], tmp_path: Path) -> None:
    broken = tmp_path / "effopt_squared_relu"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('no such accelerator')\n")
    path = os.pathsep.join([str(tmp_path), installed.get("PYTHONPATH", "")])
    (found,) = use({**installed, "PYTHONPATH": path}, {"lowering": "eager"})
    assert found["counts"] == {}
    (fault,) = found["faults"]
    assert "'squared-relu'" in fault
    assert "no such accelerator" in fault
