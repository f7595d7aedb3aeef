"""What a report holds, over a model whose rewrites are known."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import effopt
from effopt.compile import effopt as backend
from effopt.plugins.expect import manifest_of

EAGER = {"lowering": "eager"}


class Norm(nn.Module):
    """The ordinary RMSNorm, or one over the wrong dimension, which must be left alone."""

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.weight, self.dim = nn.Parameter(torch.rand(8)), dim

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(self.dim, keepdim=True) + 1e-6))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(Norm(), nn.Linear(8, 8)) for _ in range(3)])
        self.odd = Norm(dim=0)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.odd(x)


@pytest.fixture(scope="module")
def report() -> effopt.Report:
    with torch.no_grad():
        return effopt.explain(Model(), torch.randn(8, 8), options={**EAGER, "pipeline": "recognize-rms-norm"})


def test_records_name_pass_layer_and_line(report: effopt.Report) -> None:
    (graph,) = report.graphs
    assert report.counts["recognize-rms-norm"] == 3
    assert report.ops["rms_norm"] == 3
    assert sorted(a.layer for a in graph.applied if a.op == "rms_norm") == [f"layers.{i}.0" for i in range(3)]
    left = [r for r in report.rejected if r.pass_name == "recognize-rms-norm"]
    assert [r.layer for r in left] == ["odd"]
    assert "test_report.py" in left[0].source
    assert left[0].reason
    assert not graph.training
    assert graph.nodes_after < graph.nodes_before


def test_costs_are_those_of_before_and_after(report: effopt.Report) -> None:
    (graph,) = report.graphs
    assert graph.cost["bytes_after"] < graph.cost["bytes_before"]
    assert graph.op_costs["before"]["linear"].flops == graph.op_costs["after"]["linear"].flops == 3 * 2 * 8**3
    assert "rms_norm" not in graph.op_costs["before"]
    assert graph.op_costs["after"]["rms_norm"].calls == 3


def test_block_is_one_layer_before_and_after(report: effopt.Report) -> None:
    block = report.graphs[0].block
    assert block is not None
    assert block.layer == "layers.1"
    assert "rsqrt" in [line.op for line in block.before]
    assert [line.op for line in block.after if line.is_canonical] == ["rms_norm"]


def test_lowerings_give_reasons() -> None:
    with torch.no_grad(), effopt.record() as report:
        torch.compile(Model(), backend=backend, options={"lowering": "reference"})(torch.randn(8, 8))
    assert {record.kernel for record in report.lowerings} == {"reference"}
    assert {record.op for record in report.lowerings} >= {"rms_norm", "linear"}


def test_text_groups_equal_layers(report: effopt.Report) -> None:
    text = str(report)
    assert "layers.{0..2}.0" in text
    assert re.search(r"recognize-rms-norm +3", text)
    assert "test_report.py:" in text
    assert max(map(len, text.splitlines())) <= 110
    assert "\x1b" not in text


def test_text_of_nothing_and_of_a_refused_graph() -> None:
    assert "no graph was compiled" in str(effopt.Report())
    refused = effopt.explain(lambda x: x.to_dense() + 1, torch.eye(3).to_sparse(), options=EAGER)
    assert all(g.refused for g in refused.graphs)
    assert "left as it is" in str(refused) or "no graph" in str(refused)


def test_json_holds_everything_and_no_other_types(report: effopt.Report, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    assert report.to_json(path) == path.read_text()
    data = json.loads(path.read_text())
    assert data["format"] == "effopt-report/1"
    assert data["counts"]["recognize-rms-norm"] == 3
    (graph,) = data["graphs"]
    assert {record["layer"] for record in graph["applied"]} == {f"layers.{i}.0" for i in range(3)}
    assert graph["block"]["layer"] == "layers.1"
    assert graph["op_costs"]["after"]["rms_norm"]["calls"] == 3
    assert graph["seconds"]["capture"] > 0


class _Page(HTMLParser):
    """Checks that elements close, and gathers what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [str(value) for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_page_is_whole_and_needs_nothing_else(report: effopt.Report, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    text = report.to_html(path)
    assert path.read_text(encoding="utf-8") == text
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert page.links == []
    assert "url(" not in text
    assert "<script" not in text
    shown = " ".join(page.text)
    for words in ("layers.{0..2}.0", "recognize-rms-norm", "Left alone, and why", "rms_norm(%", "rsqrt("):
        assert words in shown


def test_page_escapes_what_it_is_given() -> None:
    report = effopt.Report(faults=["plugin '<b>' & co"])
    assert "&lt;b&gt;" in report.to_html()
    assert "<b>'" not in report.to_html()


def test_report_option_writes_after_each_graph(tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    options = {**EAGER, "report": str(path)}

    def two_graphs(x: Tensor) -> Tensor:
        x = x.sin()
        torch._dynamo.graph_break()
        return x.cos()

    with torch.no_grad():
        torch.compile(two_graphs, backend=backend, options=options)(torch.randn(3))
    assert len(json.loads(path.read_text())["graphs"]) == 2


def test_report_path_must_say_its_kind(tmp_path: Path) -> None:
    with pytest.raises(effopt.OptionError, match=r"\.json or \.html"):
        effopt.explain(Model(), torch.randn(8, 8), options={"report": str(tmp_path / "x.txt")})
    with pytest.raises(effopt.OptionError, match=r"\.json or \.html"):
        effopt.Report().write(tmp_path / "x.txt")


def test_explain_calls_once_and_compiles_afresh_each_time() -> None:
    calls = []

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.note()
            return x.sin()

        @torch.compiler.disable
        def note(self) -> None:
            calls.append(1)

    model = Counting()
    sizes = [len(effopt.explain(model, torch.randn(3), options=EAGER).graphs) for _ in range(12)]
    assert len(calls) == 12
    assert sizes == [1] * 12


def test_explain_sees_training() -> None:
    assert effopt.explain(Model(), torch.randn(8, 8), options=EAGER).graphs[0].training


def test_explain_refuses_bad_options_before_it_compiles() -> None:
    with pytest.raises(effopt.OptionError, match="fuse-glus"):
        effopt.explain(Model(), torch.randn(8, 8), options={"passes": "fuse-glus"})
    with pytest.raises(effopt.OptionError, match="Did you mean 'passes'"):
        effopt.explain(Model(), torch.randn(8, 8), options={"pases": ""})


def test_recordings_nest() -> None:
    with torch.no_grad(), effopt.record() as outer:
        torch.compile(lambda x: x + 1, backend=backend, options=EAGER)(torch.randn(3))
        with effopt.record() as inner:
            torch.compile(lambda x: x + 2, backend=backend, options=EAGER)(torch.randn(3))
    assert len(inner.graphs) == 1
    assert len(outer.graphs) == 2


def test_expect_passes_and_fails_with_reasons(report: effopt.Report, tmp_path: Path) -> None:
    manifest = manifest_of(report)
    effopt.expect(report, manifest)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"ops": {"rms_norm": 4, "attention": 0}}))
    with pytest.raises(effopt.UnexpectedOps, match="rms_norm: expected 4, got 3") as failure:
        effopt.expect(report, path)
    assert "attention" not in str(failure.value)
    assert "left alone:" in str(failure.value)
    assert isinstance(failure.value, AssertionError)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"ops": 3}', '{"ops": {"attention": "two"}}', '{"ops": {"attention": -1}}']
)
def test_unreadable_manifests_are_named(report: effopt.Report, tmp_path: Path, text: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(text)
    with pytest.raises(effopt.OptionError, match=r"manifest\.json"):
        effopt.expect(report, path)
    with pytest.raises(effopt.OptionError, match="missing"):
        effopt.expect(report, tmp_path / "missing.json")
