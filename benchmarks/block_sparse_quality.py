"""What attention over selected blocks costs in quality on the trained tiny language model, against density.

    python benchmarks/block_sparse_quality.py            # about six minutes on one idle core
    python benchmarks/block_sparse_quality.py --page     # and the table of docs/sparse-attention.md

The model is compiled as `torch.compile(model, backend="effopt")` does, and the table names the kernel that it
ran: on a CPU `selected-blocks`, whose calls are what is counted. Density: of the pairs of query and key that
causality leaves open, the share that lies in selected blocks. Attention recall: of the weight that dense
attention gives to all keys, the share that it gives to keys in selected blocks; the mean over queries, heads,
layers and calls. The dense attention is that of the same queries and keys, which differ from those of the
dense model where blocks were left out in layers before. FLOPs of choosing are a share of those of dense ones.
The texts are the first held-out ones of examples/tiny_lm, read in windows of its context. Nothing is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import torch
from page import fill
from torch import Tensor

from effopt.backends import block_sparse
from effopt.bench import machine
from effopt.commands.language_model import load_language_model
from effopt.compile import effopt, record
from effopt.graph.ops.block_sparse_attention import open_pairs, selected_keys
from effopt.testing.quality import Tier, evaluate
from effopt.tradeoff.reference import Reference

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "block-sparse-quality-tiny-lm.json"
PAGE = ROOT / "docs" / "sparse-attention.md"
SECTION = "<!-- written by benchmarks/block_sparse_quality.py -->"
SPECS = (
    *(f"select-blocks-by-antidiagonal{{block=32,threshold={x}}}" for x in (1.0, 0.95, 0.9, 0.8, 0.6)),
    "keep-sink-and-local-blocks{block=32,sink=32,window=1024}",
    *(f"keep-sink-and-local-blocks{{block=32,sink=32,window={x}}}" for x in (256, 64)),
    *(f"stride-blocks-by-head{{block=32,window=64,stride={x}}}" for x in (1, 2, 4, 8)),
)


class Counted:
    """What the calls of the CPU kernel were given, counted while they run."""

    def __init__(self) -> None:
        self.calls = self.rows = 0
        self.pairs = self.open = 0.0
        """Pairs of query and key: those in selected blocks, and those that causality leaves."""
        self.weight = 0.0
        """Of each row, summed."""
        self._forward = block_sparse.forward

    def __enter__(self) -> Counted:
        block_sparse.forward = self._count
        return self

    def __exit__(self, *_: object) -> None:
        block_sparse.forward = self._forward

    def _count(self, call: block_sparse.Call) -> Tensor:
        assert call.is_causal
        assert call.key_mask is None
        t, s = call.query.shape[-2], call.key.shape[-2]
        held = open_pairs(t, s, call.block, is_causal=True)
        self.calls += 1
        self.pairs += float((call.blocks * held).sum((-2, -1)).mean())
        self.open += float(held.sum())
        kept = weights(call.query, call.key, call.scale) * selected_keys(call.blocks, t, s, call.block)
        self.weight += float(kept.sum(dtype=torch.float64))
        self.rows += call.query[..., 0].numel()
        return self._forward(call)


def weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Of dense causal attention, `[b, h, t, s]`."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    hidden = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).triu(1)
    return (query @ key.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1)


def measure(
    model: Any, reference: Reference, texts: Any, spec: str, tier: Tier, probes: Any = ()
) -> dict[str, Any]:
    """One way: figures against the dense model, density, recall, FLOPs relative to dense attention.

    What is counted is counted on the texts.
    """
    torch._dynamo.reset()
    options = {"passes": spec or (), "verify": "off"}

    def own(*given: Any, **settings: Any) -> Any:
        return effopt(*given, **settings)

    compiled = torch.compile(model.forward, backend=own, dynamic=False, options=options)
    with torch.no_grad(), record() as report, Counted() as counted:
        quality = evaluate(lambda ids: compiled(input_ids=ids), texts, reference=reference, tier=tier)
    recalled = evaluate(lambda ids: compiled(input_ids=ids), texts[:1], probes=probes, tier=tier)
    op = "block_sparse_attention" if spec else "attention"
    ran = [low.kernel for graph in report.graphs for low in graph.lowerings if low.op == op]
    assert not report.faults, report.faults
    assert len(ran) == model.config.num_hidden_layers * len(report.graphs), (spec, ran)
    assert not spec or (set(ran) == {"selected-blocks"} and counted.calls), (spec, ran)
    return {
        "passes": spec or "dense",
        "kernel": ", ".join(sorted(set(ran))),
        "density": counted.pairs / counted.open if spec else 1.0,
        "attention_recall": counted.weight / counted.rows if spec else 1.0,
        "scoring": scoring_share(spec, tier.context, model.config),
        **{name: dataclasses.asdict(x) for name, x in (recalled.metrics | quality.metrics).items()},
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
        "| pass | kernel | density | attention recall | FLOPs of choosing | bits per byte |"
        " KL, nats a token | same first choice |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        kl, agreed, bits = (row[name] for name in ("kl", "agreement", "bits_per_byte"))
        lines.append(
            f"| `{row['passes']}` | {row['kernel']} | {row['density']:.3f} "
            f"| {row['attention_recall']:.4f} | {row['scoring']:.3f} "
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
        fill(PAGE, SECTION, as_table(rows))


if __name__ == "__main__":
    main()
