"""The `expect` fixture holds a model to its manifest, and writes it when asked."""

from __future__ import annotations

import importlib.metadata
import json

import pytest

pytest_plugins = ["pytester"]

TEST = """
import torch
from torch.nn import functional as F

def model(x, w):
    return F.silu(x @ w) * (x + 1)

def norm(x, w):
    return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

INPUTS = (torch.randn(3, 4), torch.randn(4))

def test_mapping(expect):
    assert expect(norm, *INPUTS, manifest={"ops": {"rms_norm": 1}}).ops["rms_norm"] == 1

def test_file(expect):
    expect(norm, *INPUTS, manifest="norm.json")

def test_record(effopt_report):
    from effopt.compile import effopt
    torch.compile(norm, backend=effopt, options={"lowering": "eager"})(*INPUTS)
    assert effopt_report.ops["rms_norm"] == 1
"""


@pytest.fixture
def tester(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makepyfile(TEST)
    return pytester


def run(tester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    # Where effopt is installed, its entry point loads the plugin already, and pytest takes it only once.
    installed = any(entry.name == "effopt" for entry in importlib.metadata.entry_points(group="pytest11"))
    plugin = [] if installed else ["-p", "effopt.testing.pytest_plugin"]
    return tester.runpytest_subprocess(*plugin, "-p", "no:cacheprovider", "-q", *arguments)


def test_a_lost_fusion_fails(tester: pytest.Pytester) -> None:
    (tester.path / "norm.json").write_text(json.dumps({"ops": {"rms_norm": 2}}))
    result = run(tester)
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(["*rms_norm: expected 2, got 1*"])


def test_update_writes_the_manifest(tester: pytest.Pytester) -> None:
    run(tester, "--effopt-update-expect").assert_outcomes(passed=3)
    assert json.loads((tester.path / "norm.json").read_text())["ops"]["rms_norm"] == 1
    run(tester).assert_outcomes(passed=3)
