"""Runs one of the sections of benchmarks/attention.py that have shapes, versions and a table of their own.

What is measured is written after each shape, so that a run which is ended keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import time
from types import ModuleType
from typing import Any

import block_sparse_section
import decode_section
import linear_section
import prefill_section
import torch
from page import fill
from timing import ceilings

from effopt.bench import machine

SECTIONS: dict[str, ModuleType] = {
    "prefill": prefill_section,
    "decode": decode_section,
    "block-sparse": block_sparse_section,
    "linear": linear_section,
}


def run(arguments: argparse.Namespace) -> None:
    """Measure, print and keep a section; shapes that `arguments.seconds` leaves no time for are named."""
    section, device = SECTIONS[arguments.section], torch.device(arguments.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    start, most = time.perf_counter(), ceilings(device, dtype)
    found: dict[str, Any] = {
        "machine": machine(),
        "ceilings": {"matmul_flops_per_s": most[0], "copy_bytes_per_s": most[1]},
        "dtype": str(dtype).removeprefix("torch."),
        "heads": section.HEADS,
        "rounds": arguments.rounds,
        "measurements": [],
        "left_out": [],
    }
    if arguments.section == "linear":
        found["fla"] = linear_section.fla_or_why(device)[1]
    with torch.no_grad():
        for t in arguments.sizes or section.SIZES[device.type]:
            for d in arguments.head_sizes or section.HEAD_SIZES:
                if arguments.seconds and time.perf_counter() - start > arguments.seconds:
                    found["left_out"].append({"t": t, "d": d, "why": f"{arguments.seconds:g} s are used up"})
                    continue
                rows = section.measure(t, d, device, dtype, arguments.rounds, most)
                found["measurements"] += rows
                print("\n".join(section.table(rows).splitlines()[2:]), flush=True)
                keep(found, arguments)
    keep(found, arguments)
    fla = f" {found['fla']}." if "fla" in found else ""
    text = f"{about(found)}{fla}\n\n"
    text += section.table(found["measurements"])
    print(text)
    for row in found["left_out"]:
        print(f"left out: t {row['t']}, d {row['d']}: {row['why']}")
    if arguments.write:
        fill(arguments.write, section.SECTION, text)
    wrong = [row for row in found["measurements"] if row.get("why_not", "").startswith("WRONG")]
    if wrong:
        raise SystemExit("\n".join(f"{row['version']}, t {row['t']}: {row['why_not']}" for row in wrong))


def keep(found: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Write what is there so far, if a file was asked for."""
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def about(found: dict[str, Any]) -> str:
    """What was measured on."""
    text = ", ".join(f"{name} {value}" for name, value in found["machine"].items() if value)
    batch = "" if any("b" in row for row in found["measurements"]) else "batch 1, "
    text += f"; {found.get('dtype', 'float32')}, {batch}{found['heads']} heads,"
    text += f" median of {found['rounds']} rounds. Ceilings:"
    text += f" {found['ceilings']['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s,"
    return text + f" {found['ceilings']['copy_bytes_per_s'] / 1e9:.1f} GB/s."
