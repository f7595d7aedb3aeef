"""What attention over selected blocks costs in quality on the trained tiny language model, against density.

    python benchmarks/block_sparse_quality.py            # a few minutes on one core
    python benchmarks/block_sparse_quality.py --page     # and the table of docs/sparse-attention.md

Density is counted, not predicted: of the pairs of query and key that causality leaves open, the share that
lies in selected blocks, over all calls of all layers. FLOPs of choosing are a share of those of dense ones.
The texts are the first held-out ones of examples/tiny_lm, read in windows of its context. Nothing is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from effopt.bench import machine
from effopt.commands.language_model import load_language_model
from effopt.compile import effopt, record
from effopt.graph.ops.block_sparse_attention import open_pairs
from effopt.testing.quality import Tier, evaluate
from effopt.tradeoff.reference import Reference

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "block-sparse-quality-tiny-lm.json"
PAGE = ROOT / "docs" / "sparse-attention.md"
SECTION = re.compile(
    r"(<!-- written by benchmarks/block_sparse_quality.py -->\n).*?(<!-- end -->)", re.DOTALL
)
SPECS = (
    *(f"select-blocks-by-antidiagonal{{block=32,threshold={x}}}" for x in (1.0, 0.95, 0.9, 0.8, 0.6)),
    "keep-sink-and-local-blocks{block=32,sink=32,window=1024}",
    *(f"keep-sink-and-local-blocks{{block=32,sink=32,window={x}}}" for x in (256, 64)),
    *(f"stride-blocks-by-head{{block=32,window=64,stride={x}}}" for x in (1, 2, 4, 8)),
)


class Counted:
    """Pairs of query and key in the blocks that the op is given, and those that causality leaves open."""

    def __init__(self) -> None:
        self.pairs = self.open = 0.0
        self._op = importlib.import_module("effopt.graph.ops.block_sparse_attention")
        self._selected_keys = self._op.selected_keys

    def __enter__(self) -> Counted:
        self._op.selected_keys = self._count
        return self

    def __exit__(self, *_: object) -> None:
        self._op.selected_keys = self._selected_keys

    def _count(self, blocks: torch.Tensor, t: int, s: int, block: int) -> torch.Tensor:
        held = open_pairs(t, s, block, is_causal=True)
        self.pairs += float((blocks * held).sum((-2, -1)).mean())
        self.open += float(held.sum())
        return self._selected_keys(blocks, t, s, block)


def measure(model: Any, reference: Reference, texts: Any, spec: str, tier: Tier) -> dict[str, Any]:
    """One way: figures against the dense model, density, FLOPs of attention relative to dense ones."""
    torch._dynamo.reset()
    options = {"passes": spec or (), "lowering": "eager", "verify": "off"}

    def own(*given: Any, **settings: Any) -> Any:
        return effopt(*given, **settings)

    compiled = torch.compile(model.forward, backend=own, dynamic=False, options=options)
    with torch.no_grad(), record() as report, Counted() as counted:
        quality = evaluate(lambda ids: compiled(input_ids=ids), texts, reference=reference, tier=tier)
    replaced = sum(a.op == "block_sparse_attention" for a in report.applied)
    assert not report.faults, report.faults
    assert bool(counted.open) == bool(spec), spec
    assert replaced == (model.config.num_hidden_layers if spec else 0), (spec, replaced)
    return {
        "passes": spec or "dense",
        "density": counted.pairs / counted.open if counted.open else 1.0,
        "scoring": scoring_share(spec, tier.context, model.config),
        **{name: dataclasses.asdict(interval) for name, interval in quality.metrics.items()},
    }


def scoring_share(spec: str, t: int, config: Any) -> float:
    """FLOPs of choosing the blocks, as a share of those of dense causal attention."""
    found = re.search(r"antidiagonal\{(.*)\}", spec)
    if found is None or "threshold=1.0" in spec:
        return 0.0
    stride = int((re.search(r"stride=(\d+)", found[1]) or [0, 8])[1])
    d = config.head_dim
    return (t * t / stride * (2 * d + 5 / stride)) / (t * (t + 1) / 2 * (4 * d + 5))


def as_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| pass | density | FLOPs of choosing | bits per byte | KL, nats a token | same first choice |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        kl, agreed, bits = (row[name] for name in ("kl", "agreement", "bits_per_byte"))
        lines.append(
            f"| `{row['passes']}` | {row['density']:.3f} | {row['scoring']:.3f} "
            f"| {bits['value']:.4f} [{bits['low']:.4f}, {bits['high']:.4f}] "
            f"| {max(kl['value'], 0.0):.5f} | {agreed['value']:.4f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1025, help="of each text")
    parser.add_argument("--passes", nargs="*", default=list(SPECS))
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="refresh docs/sparse-attention.md")
    settings = parser.parse_args()
    judged = load_language_model(f"{ROOT}/examples/tiny_lm/evaluate.py:language_model")
    tier = Tier(stride=1024, rows=2, texts=settings.texts, tokens_per_text=settings.tokens, resamples=500)
    rows, reference = [], Reference(lambda ids: judged.model(input_ids=ids))
    for spec in ("", *settings.passes):
        rows.append(measure(judged.model, reference, judged.texts, spec, tier))
        print(as_table(rows[-1:]).splitlines()[-1], flush=True)
    found = {"machine": machine(), "tier": dataclasses.asdict(tier), "rows": rows}
    settings.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if settings.page:
        text, count = SECTION.subn(lambda m: f"{m[1]}{as_table(rows)}\n{m[2]}", PAGE.read_text("utf-8"))
        if count != 1:
            raise SystemExit(f"{PAGE} has no section for the table")
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
