"""What lossy passes cost on the trained tiny language model: figures, picture and page in one go.

    python benchmarks/quality.py                  # quick tier, about fifteen minutes on two idle cores
    python benchmarks/quality.py --full           # all held-out files and probes
    python benchmarks/quality.py --page --rounds 9   # and the tables of docs/quality.md

The same as `effopt bench quality examples/tiny_lm/evaluate.py:language_model`, with the results put where
they are kept: benchmarks/results/quality-tiny-lm-cpu.json, and for --page docs/quality.md with its picture.
Run it on an idle machine: the speeds are measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from page import fill

from effopt.commands.bench_quality import DEFAULT
from effopt.commands.language_model import load_language_model
from effopt.commands.terminal import output, progress
from effopt.quality.texts import FULL, QUICK
from effopt.tradeoff import Decoding, Tradeoff, Way, measure
from effopt.tradeoff.chart import as_png, require_matplotlib
from effopt.tradeoff.render import as_markdown, as_tables

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quality-tiny-lm-cpu.json"
PAGE, PICTURE = ROOT / "docs" / "quality.md", ROOT / "docs" / "quality-tiny-lm.png"
SECTION = "<!-- written by benchmarks/quality.py -->"


def publish(result: Tradeoff) -> None:
    """Write the tables into the page, and the picture beside it."""
    text = f"{as_markdown(result)}\n\n![KL divergence against each cost]({PICTURE.name})\n"
    fill(PAGE, SECTION, f"\n{text}")
    PICTURE.write_bytes(as_png(result))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--passes", nargs="*", default=list(DEFAULT))
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="refresh docs/quality.md")
    settings = parser.parse_args()
    require_matplotlib()
    decoding = Decoding(rounds=settings.rounds)
    judged = load_language_model(f"{ROOT}/examples/tiny_lm/evaluate.py:language_model")
    with progress("starting") as tell:
        result = measure(
            judged.model,
            judged.texts,
            [Way(text) for text in settings.passes],
            probes=judged.probes,
            tier=FULL if settings.full else QUICK,
            decoding=decoding,
            progress=tell,
        )
    settings.json.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    if settings.page:
        publish(result)
    output().print(as_tables(result))
    sys.exit(1 if result.failed else 0)


if __name__ == "__main__":
    main()
