"""Attention blocks of `transformers` architectures that Inductor and effopt recognise, and what both compute.

    python benchmarks/recognition.py --page --json benchmarks/results/recognition-cpu.json

Each architecture that has attention, small, with random weights and attention as `transformers` spells it
out (`attn_implementation="eager"`), one forward pass without gradients. Inductor counts its own matches
(`fuse_attention` of `torch._dynamo.utils.counters`, its caches off, for a hit in them counts nothing);
effopt's are the ops `attention` of its report. Errors are the largest difference from eager over its largest
value.
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

sys.path.insert(0, str(Path(__file__).parent.parent))

from page import fill
from sweep import relative

from effopt.bench import machine
from effopt.compile import record
from tests.models.architectures import ARCHITECTURES, MORE, build, main_output

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"
START = "<!-- written by benchmarks/recognition.py -->"
OURS = ("recognize-attention", "recognize-sdpa-call")


@dataclass
class Row:
    """One architecture."""

    name: str
    blocks: int
    inductor: int = 0
    effopt: int = 0
    inductor_error: float = float("nan")
    effopt_error: float = float("nan")
    reasons: list[str] = field(default_factory=list)
    """Of what effopt left alone, each once."""
    failures: dict[str, str] = field(default_factory=dict)
    """By compiler: what it raised."""


def measure(name: str) -> Row:
    """Run one architecture three ways."""
    row = Row(name, (ARCHITECTURES.get(name) or MORE[name]).attention_blocks)
    model, inputs = build(name, "eager")
    with torch.no_grad():
        eager = main_output(model(**inputs))
        for compiler in ("inductor", "effopt"):
            torch._dynamo.reset()
            counters.clear()
            try:
                with record() as report, torch._inductor.config.patch(force_disable_caches=True):
                    output = main_output(torch.compile(model, backend=compiler)(**inputs))
            except Exception as raised:  # noqa: BLE001 - a cell of the table
                row.failures[compiler] = f"{type(raised).__name__}: {str(raised)[:300]}"
                continue
            error = relative(output, eager)
            if compiler == "inductor":
                row.inductor, row.inductor_error = counters["inductor"]["fuse_attention"], error
            else:
                row.effopt, row.effopt_error = report.ops["attention"], error
                row.reasons = sorted({r.reason for r in report.rejected if r.pass_name in OURS})
    return row


def table(rows: list[Row]) -> str:
    """For the page: totals first, then a line for each architecture."""
    blocks, inductor, effopt = (sum(getattr(r, x) for r in rows) for x in ("blocks", "inductor", "effopt"))
    on = machine()
    lines = [
        f"torch {on['torch']}, transformers {transformers.__version__}, {on['processor']}.",
        "",
        f"{blocks} blocks of {len(rows)} architectures: Inductor takes **{inductor}**, effopt **{effopt}**.",
        "",
        "| architecture | blocks | Inductor | effopt | error of Inductor | of effopt |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = (
            row.failures.get("inductor", "")[:60] or row.inductor,
            row.failures.get("effopt", "")[:60] or row.effopt,
            *(f"{getattr(row, f'{way}_error'):.0e}" for way in ("inductor", "effopt")),
        )
        lines.append(f"| {row.name} | {row.blocks} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--names", type=lambda text: text.split(","), default=[*ARCHITECTURES, *MORE])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", action="store_true", help=f"put the table into {PAGE.name}")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows: list[Row] = []
    for name in arguments.names:
        if (ARCHITECTURES.get(name) or MORE[name]).attention_blocks:
            rows.append(measure(name))
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
