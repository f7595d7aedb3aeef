"""Attention blocks of `transformers` architectures that Inductor and effopt recognise, and what both compute.

    python benchmarks/recognition.py --page --json benchmarks/results/recognition-cpu.json

Each architecture that has attention, language models and others, small, with random weights and attention
as `transformers` spells it out (`attn_implementation="eager"`), one forward pass without gradients. Inductor
counts its own matches (`fuse_attention` of `torch._dynamo.utils.counters`, its caches off, for a hit in them
counts nothing); effopt's are the ops `attention` of its report. Errors are the largest difference from eager
over its largest value, of all outputs. With `--graphs` no code is generated: the graphs that both compilers
have rewritten run op by op, so that many architectures take minutes.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx

sys.path.insert(0, str(Path(__file__).parent.parent))

from page import fill
from sweep import relative

from effopt.bench import machine
from effopt.compile import record
from tests.models.architectures import ARCHITECTURES, MORE, build
from tests.models.other_kinds import OTHER_KINDS, all_outputs, build_other

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
START = "<!-- written by benchmarks/recognition.py -->"
OURS = ("recognize-attention", "recognize-sdpa-call")


@dataclass
class Row:
    """One architecture."""

    name: str
    blocks: int
    inductor: int | None = None
    effopt: int | None = None
    """Blocks that each takes; None: it was not run."""
    inductor_error: float = float("nan")
    effopt_error: float = float("nan")
    reasons: list[str] = field(default_factory=list)
    """Of what effopt left alone, each once."""
    failures: dict[str, str] = field(default_factory=dict)
    """By compiler: what it raised."""


def blocks_of(name: str) -> int:
    """How many attention blocks the row of an architecture counts."""
    return {**ARCHITECTURES, **MORE, **OTHER_KINDS}[name].attention_blocks


def outputs(function: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """All that a model returns; some draw numbers, so each run begins at one seed."""
    torch.manual_seed(0)
    return all_outputs(function(**inputs))


def inductor_graph(module: torch.fx.GraphModule, inputs: Any) -> Any:
    """A backend: all that Inductor does to a graph before it generates code."""

    def run_as_it_is(graph: torch.fx.GraphModule, _: Any, **__: Any) -> Any:
        def run(operands: list[Any]) -> Any:
            return graph(*operands)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    return compile_fx(module, inputs, inner_compile=run_as_it_is)


def compiled(model: torch.nn.Module, compiler: str, graphs_only: bool) -> Any:
    """The model under one of the two, with code generated or without."""
    if not graphs_only:
        return torch.compile(model, backend=compiler)
    if compiler == "inductor":
        return torch.compile(model, backend=inductor_graph)
    return torch.compile(model, backend=compiler, options={"lowering": "eager"})


def measure(name: str, compilers: list[str], graphs_only: bool = False) -> Row:
    """Run one architecture three ways."""
    row = Row(name, blocks_of(name))
    model, inputs = (build_other if name in OTHER_KINDS else build)(name, "eager")
    settings = torch._inductor.config.patch(force_disable_caches=True, fallback_random=True)
    with torch.no_grad(), settings:
        eager = outputs(model, inputs)
        for compiler in compilers:
            torch._dynamo.reset()
            counters.clear()
            try:
                with record() as report:
                    results = outputs(compiled(model, compiler, graphs_only), inputs)
            except Exception as raised:  # noqa: BLE001 - a cell of the table
                row.failures[compiler] = f"{type(raised).__name__}: {str(raised)[:300]}"
                continue
            error = max(relative(x, y) for x, y in zip(results, eager, strict=True) if y.numel())
            if compiler == "inductor":
                row.inductor, row.inductor_error = counters["inductor"]["fuse_attention"], error
            else:
                row.effopt, row.effopt_error = report.ops["attention"], error
                row.reasons = sorted({r.reason for r in report.rejected if r.pass_name in OURS})
    return row


def cell(row: Row, compiler: str) -> str:
    """How many blocks, empty if the compiler was not run."""
    count = getattr(row, compiler)
    return "" if count is None else str(count)


def table(rows: list[Row]) -> str:
    """For the page: totals first, then a line for each architecture."""
    totals = []
    for compiler in ("Inductor", "effopt"):
        run = [row for row in rows if getattr(row, compiler.lower()) is not None]
        taken, blocks = sum(getattr(r, compiler.lower()) for r in run), sum(r.blocks for r in run)
        totals.append(f"{compiler} takes **{taken}** of {blocks} blocks in {len(run)} architectures")
    on = machine()
    lines = [
        f"torch {on['torch']}, transformers {transformers.__version__}, {on['processor']}.",
        "",
        "; ".join(totals) + ".",
        "",
        "| architecture | blocks | Inductor | effopt | error of Inductor | of effopt |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = (
            *(row.failures.get(way, "")[:60] or cell(row, way) for way in ("inductor", "effopt")),
            *(f"{getattr(row, f'{way}_error'):.0e}".replace("nan", "") for way in ("inductor", "effopt")),
        )
        lines.append(f"| {row.name} | {row.blocks} | " + " | ".join(map(str, cells)) + " |")
    left = [row for row in rows if row.effopt is not None and row.effopt < row.blocks]
    lines += ["", f"Left alone by effopt, in {len(left)} architectures:", ""] if left else []
    for row in left:
        why = "; ".join(row.reasons or [*row.failures.values()])
        lines.append(f"- {row.name}, {row.blocks - (row.effopt or 0)} of {row.blocks}: {why}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--names", type=lambda text: text.split(","), default=[*ARCHITECTURES, *MORE, *OTHER_KINDS]
    )
    parser.add_argument(
        "--compilers",
        type=lambda text: text.split(","),
        default=["inductor", "effopt"],
        help="or one of them",
    )
    parser.add_argument("--graphs", action="store_true", help="generate no code")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", action="store_true", help=f"put the table into {PAGE.name}")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows: list[Row] = []
    for name in arguments.names:
        if blocks_of(name):
            rows.append(measure(name, arguments.compilers, arguments.graphs))
            print(asdict(rows[-1]), flush=True)
    text = table(rows)
    print(text)
    if arguments.json:
        result: dict[str, Any] = {"machine": machine(), "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if arguments.page:
        fill(PAGE, START, text)


if __name__ == "__main__":
    main()
