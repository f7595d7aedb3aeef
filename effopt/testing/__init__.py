"""Tests for plugin authors: one call for a pass, one for a lowering.

    from effopt.testing import check_pass
    def test_my_pass(): check_pass(MyPass)

`effopt.testing.strategies` needs hypothesis, `effopt.testing.pytest_plugin` needs pytest (extra `testing`).
"""

from __future__ import annotations

from effopt.testing.check_lowering import LoweringCheck, check_lowering
from effopt.testing.check_pass import PassCheck, check_pass
from effopt.testing.equivalent import assert_equivalent
from effopt.testing.trial import Trial, capture_example, disagreement, run_passes

__all__ = [
    "LoweringCheck",
    "PassCheck",
    "Trial",
    "assert_equivalent",
    "capture_example",
    "check_lowering",
    "check_pass",
    "disagreement",
    "run_passes",
]
