"""The page says, layer by layer, what was quantised, skipped and shared, and why the rest was not."""

from __future__ import annotations

import re

import torch

import effopt
from effopt.plugins.render.compressed import compressed_rows, is_compressed
from tests.models.architectures import build

PASSES = "skip-layers{keep=0.75},share-kv-across-layers{group=2},quantize-weights{bits=8,exclude=*.down_proj}"


def report_of(passes: str) -> effopt.Report:
    model, inputs = build("llama", num_hidden_layers=4)
    with torch.no_grad():
        return effopt.explain(model, **inputs, options={"passes": passes, "lowering": "eager"})


def test_every_layer_has_its_row() -> None:
    report = report_of(PASSES)
    rows = {row[0]: row for row in compressed_rows(report.graphs[0])}
    paths = [f"model.layers.{i}" for i in range(4)]
    assert list(rows) == [*paths, "(outside of the layers)"]
    skipped = next(p for p in paths if rows[p][1] == "skip-layers: skip")
    first, second, third = (p for p in paths if p != skipped)
    assert rows[first][1] == "as it is"
    assert rows[second][1] == f"share-kv-across-layers: {first}"
    assert rows[third][1] == "as it is"
    assert rows[skipped][2:5] == ("", "", "")
    # q, k, v, o, gate, up; the second one has no keys and values of its own.
    assert [rows[p][2] for p in (first, second, third)] == ["6", "4", "6"]
    assert "mlp.down_proj: exclude=*.down_proj names" in rows[first][5]
    assert rows["(outside of the layers)"][2] == "1"  # the head


def test_bytes_are_those_of_the_weights() -> None:
    report = report_of("quantize-weights{bits=8}")
    replaced = [a for a in report.applied if a.pass_name == "quantize-weights"]
    assert {a.layer for a in replaced} >= {"lm_head", "model.layers.3.mlp.up_proj"}
    head = next(a for a in replaced if a.layer == "lm_head")
    assert head.bytes_before == 100 * 64 * 4
    assert head.bytes_after == 100 * 64 + 100 * 4  # a code a weight, a float32 scale a row
    page = report.to_html()
    assert re.search(r"Compressed, layer by layer", page)
    assert f"{len(replaced)} weights replaced" in page


def test_nothing_compressed_is_no_table() -> None:
    report = report_of("")
    assert not is_compressed(report.graphs[0])
    assert "Compressed, layer by layer" not in report.to_html()
