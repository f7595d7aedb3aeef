"""Run all that measures kernels on a GPU, and keep it in one file, benchmarks/results/<gpu>.json.

    python benchmarks/gpu.py                                   # everything, about ten minutes
    python benchmarks/gpu.py prefill decode --seconds 250      # some of it; --json elsewhere.json

Each part is a process of its own, which frees its memory, and which a fault of the device ends alone; a part
begins no further shape when its seconds are used up, and says what it left out. What is done is written after
each part, beside what the file held of others.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
SECTIONS = ("prefill", "decode", "block-sparse", "linear")
PARTS = (*SECTIONS, "kernels")
"""In this order: first what has aims."""
SECONDS, LAST_S = 100.0, 60.0
"""Of each part, after which it begins no further shape; and how long the last one may take, compiling."""


def command_of(part: str, device: str, seconds: float, into: Path) -> list[str]:
    """What runs one part."""
    if part == "kernels":
        return [str(HERE / "kernels.py"), "--seconds", str(seconds), "--json", str(into)]
    given = ["--section", part, "--device", device, "--rounds", "10", "--seconds", str(seconds)]
    return [str(HERE / "attention.py"), *given, "--json", str(into)]


def run_part(part: str, device: str, seconds: float) -> dict[str, Any]:
    """Run a part, and give what it wrote; with `fault`, the end of what it printed, if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        into = Path(folder) / "found.json"
        command = [sys.executable, *command_of(part, device, seconds, into)]
        try:
            done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=seconds + LAST_S)
            fault = done.stderr[-2000:] if done.returncode else ""
        except subprocess.TimeoutExpired:
            fault = f"ended after {seconds + LAST_S:g} s"
        found: dict[str, Any] = json.loads(into.read_text("utf-8")) if into.exists() else {}
    return found | ({"fault": fault} if fault else {})


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all of them if none is named")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each part")
    parser.add_argument("--json", type=Path, help="instead of benchmarks/results/<gpu>.json")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"unknown part {sorted(unknown)}; there are {', '.join(PARTS)}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch.cuda.is_available() is False here")
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else arguments.device
    path = arguments.json or HERE / "results" / (
        re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json"
    )
    kept: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    faults = []
    for part in arguments.parts or PARTS:
        print(f"== {part}", flush=True)
        kept[part] = run_part(part, arguments.device, arguments.seconds)
        path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        if "fault" in kept[part]:
            faults.append(part)
            print(f"{part}: {kept[part]['fault']}", flush=True)
    print(f"written to {path}" + (f"; faults in {', '.join(faults)}" if faults else ""))
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
