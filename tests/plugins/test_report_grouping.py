"""Many records as few lines, and numbers as words."""

from __future__ import annotations

import pytest

from effopt.graph.rewrite import Rejected
from effopt.plugins.render.grouping import by_reason, compact, general, kernels, near_misses
from effopt.plugins.render.page import as_page
from effopt.plugins.render.quantities import change, duration, scaled
from effopt.plugins.render.text import as_text
from effopt.plugins.report import GraphReport, LoweringRecord, Report


@pytest.mark.parametrize(
    ("paths", "shown"),
    [
        (["a.0.b", "a.1.b", "a.2.b"], ("a.{0..2}.b",)),
        (["a.10.b", "a.2.b", "a.1.b", "a.7.b"], ("a.{1..2,7,10}.b",)),
        (["a.3.b"], ("a.3.b",)),
        (["head", "", "head"], ("(model)", "head")),
        (["e.0.x.0", "e.1.x.0", "e.0.x.1"], ("e.{0..1}.x.0", "e.0.x.1")),
        ([], ()),
    ],
)
def test_compact(paths: list[str], shown: tuple[str, ...]) -> None:
    assert compact(paths) == shown


def test_reasons_are_equal_but_for_node_numbers() -> None:
    assert (
        general("at mul_4: expected add, got rms_norm_default_12")
        == "at mul: expected add, got rms_norm_default"
    )
    assert (
        general("the result would be [1, 16], dtype float32") == "the result would be [1, 16], dtype float32"
    )


def test_near_misses_group_by_pass_and_reason() -> None:
    records = [
        Rejected("fuse", f"mul_{i}", f"l.{i}", "/a/b.py:7 in forward", f"mul_{i} is used by {w}")
        for i, w in enumerate(["x_1", "x_2", "y_3"])
    ]
    (first, second) = near_misses(records)
    assert first[1] == "mul is used by x"
    assert (first[2].count, first[2].layers, first[2].sources) == (2, ("l.{0..1}",), ("b.py:7 in forward",))
    assert second[2].nodes == ("mul_2",)


def test_kernels_are_counted_by_choice() -> None:
    records = [
        LoweringRecord(f"n_{i}", "attention", "sdpa", (("triton", f"node_{i} is on cpu"),)) for i in range(3)
    ]
    assert kernels(records) == [("attention", "sdpa", 3, (("triton", "node is on cpu"),))]


def test_kernels_with_one_reason_stand_together() -> None:
    refused = [("triton", "no GPU"), ("flex", "slower"), ("triton-stream-k", "no GPU")]
    assert by_reason(refused) == [("triton, triton-stream-k", "no GPU"), ("flex", "slower")]
    record = LoweringRecord("n", "attention", "sdpa", tuple(refused))
    report = Report(graphs=[GraphReport(pipeline="", lowerings=[record])])
    assert "triton, triton-stream-k: no GPU; flex: slower" in as_text(report)
    assert "<b>triton, triton-stream-k</b> no GPU<br><b>flex</b> slower" in as_page(report)


def test_quantities() -> None:
    assert [scaled(v, "B") for v in (0, 999, 1e3, 4.123e9)] == ["0 B", "999 B", "1 kB", "4.12 GB"]
    assert [change(*p) for p in ((0, 1), (100, 100.1), (100, 69), (100, 102))] == [
        "",
        "same",
        "-31 %",
        "+2 %",
    ]
    assert [duration(v) for v in (120, 8.21, 0.041, 1.2e-4)] == ["120 s", "8.2 s", "41 ms", "120 us"]
