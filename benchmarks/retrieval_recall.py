"""Whether a model still fetches a fact from far back: streaming heads and selected blocks, judged by recall.

    python benchmarks/retrieval_recall.py          # some ten minutes on two cores
    python benchmarks/retrieval_recall.py --page   # and tables of docs/compressing.md and sparse-attention.md

The model of examples/recall_lm has learned to. Recall at a distance is the share of probes whose last token,
the answer to a question about a fact, is the first choice; intervals are 95 % bootstraps over probes. KL is
the divergence from the dense model on held-out sequences. All is compiled as `torch.compile(model,
backend="effopt")` does, and the rows name the kernels that ran. What is counted of attention and of caches is
what split_heads_quality.py and block_sparse_quality.py count. Nothing is timed.

Heads: for each share a plan is calibrated, and put beside plans with as many streaming heads chosen
otherwise: those that calibration would keep first, or any.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import block_sparse_quality
import split_heads_quality
from page import fill

import effopt
from effopt.bench import machine
from effopt.commands.language_model import load_language_model
from effopt.testing.quality import Tier
from effopt.tradeoff.reference import Reference

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SECTION = "<!-- written by benchmarks/retrieval_recall.py -->"
TIER = Tier(context=512, stride=512, rows=16, probes_per_distance=32)
SINK, RECENT = 4, 32
SHARES, DRAWS = (1.0, 0.75, 0.5, 0.25, 0.125, 0.0), 1
SPECS = (
    *(f"select-blocks-by-antidiagonal{{block=16,threshold={x}}}" for x in (1.0, 0.9, 0.8, 0.6)),
    *(f"keep-sink-and-local-blocks{{block=16,sink=16,window={x}}}" for x in (512, 128, 32)),
    *(f"stride-blocks-by-head{{block=16,window=32,stride={x}}}" for x in (1, 2, 8)),
)


def plans(model: Any, batches: Any) -> Iterator[tuple[float, str, effopt.Plan]]:
    """(share of heads that see all, who chose them, plan)."""
    for share in SHARES:
        spec = f"split-heads-by-role{{retrieval={share},sink={SINK},recent={RECENT}}}"
        plan = effopt.calibrate(model, batches, spec)
        yield share, "calibration", plan
        heads = [(score, at) for at, score in scores(plan).items()]
        count = round((1 - share) * len(heads))
        if 0 < count < len(heads):
            greatest = sorted(heads, reverse=True)[:count]
            yield share, "the other way round", streaming(plan, {at for _, at in greatest})
            for draw in range(DRAWS):
                drawn = random.Random(draw).sample(sorted(heads), count)
                yield share, f"at random, {draw + 1}", streaming(plan, {at for _, at in drawn})


def scores(plan: effopt.Plan) -> dict[tuple[int, int], float]:
    """(layer, KV head) -> its error when it streams."""
    layers = enumerate(split_heads_quality.entries(plan))
    return {(layer, head): score for layer, entry in layers for head, score in enumerate(entry.score)}


def streaming(plan: effopt.Plan, heads: set[tuple[int, int]]) -> effopt.Plan:
    """The plan with these (layer, KV head) streaming, and no others."""
    (section,) = plan.sections
    (stack,) = section.stacks
    layers = []
    for layer, entry in enumerate(stack.layers):
        mine = sorted(head for at, head in heads if at == layer)
        decision = {"streaming": mine, "sink": SINK, "recent": RECENT} if mine else None
        layers.append(dataclasses.replace(entry, decision=decision))
    stacks = (dataclasses.replace(stack, layers=tuple(layers)),)
    return effopt.Plan((dataclasses.replace(section, stacks=stacks),))


def distances(row: dict[str, Any]) -> list[str]:
    return [name for name in row if name.startswith("recall@")]


def figures(row: dict[str, Any]) -> str:
    """Cells that both tables have: recall by distance, divergence from the dense model."""
    cells = [f"{row[d]['value']:.2f} [{row[d]['low']:.2f}, {row[d]['high']:.2f}]" for d in distances(row)]
    return " | ".join([*cells, f"{max(row['kl']['value'], 0.0):.5f}"])


def heading(first: list[str], row: dict[str, Any]) -> list[str]:
    """The first columns hold words, or numbers that are no figures of quality."""
    names = [*first, *distances(row), "KL, nats a token"]
    return [f"| {' | '.join(names)} |", "|" + " --- |" * len(first) + " --: |" * (len(names) - len(first))]


def heads_table(rows: list[dict[str, Any]]) -> str:
    first = ["`retrieval`", "heads chosen by", "kernels", "KV bytes", "of ordinary", "attention recall"]
    lines = heading(first, rows[0])
    for row in rows:
        share = row["kv_bytes"] / row["ordinary_kv_bytes"]
        lines.append(
            f"| {row['retrieval']} | {row['by']} | {', '.join(row['kernels'])} | {row['kv_bytes']:,} "
            f"| {share:.3f} | {row['attention_recall']:.4f} | {figures(row)} |"
        )
    return "\n".join(lines)


def blocks_table(rows: list[dict[str, Any]]) -> str:
    lines = heading(["pass", "kernel", "density", "FLOPs, of dense", "attention recall"], rows[0])
    for row in rows:
        lines.append(
            f"| `{row['passes']}` | {row['kernel']} | {row['density']:.3f} "
            f"| {row['density'] + row['scoring']:.3f} | {row['attention_recall']:.4f} | {figures(row)} |"
        )
    return "\n".join(lines)


def heads_rows(model: Any, texts: Any, probes: Any) -> Iterator[dict[str, Any]]:
    """Calibrated on the last eight texts, judged on the others."""
    batches = [text.tokens[None, : TIER.context] for text in texts[-8:]]
    judge = split_heads_quality.Judge(model, texts[:-8], probes, TIER, prompt=448, length=512)
    cache: dict[str, int] = {}
    for share, by, plan in plans(model, batches):
        if by == "calibration":  # the other plans of a share have as many streaming heads, so as many bytes
            cache = split_heads_quality.held(judge, plan)
        layers = split_heads_quality.entries(plan)
        streams = {entry.path: (entry.decision or {}).get("streaming", []) for entry in layers}
        told = {"scores": {entry.path: entry.score for entry in layers}, "streaming": streams}
        yield {"retrieval": share, "by": by, **told, **split_heads_quality.measure(judge, plan), **cache}


def blocks_rows(model: Any, texts: Any, probes: Any) -> Iterator[dict[str, Any]]:
    reference = Reference(lambda ids: model(input_ids=ids))
    for spec in ("", *SPECS):
        yield block_sparse_quality.measure(model, reference, texts[:-8], spec, TIER, probes)


TABLES = {
    "heads": (heads_rows, heads_table, split_heads_quality.PAGE),
    "blocks": (blocks_rows, blocks_table, block_sparse_quality.PAGE),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of retrieval-TABLE-cpu.json")
    parser.add_argument("--page", action="store_true", help="refresh the tables of both pages")
    settings = parser.parse_args()
    judged = load_language_model(f"{ROOT}/examples/recall_lm/recall_model.py:language_model")
    for name in settings.tables:
        measured, table, page = TABLES[name]
        rows: list[dict[str, Any]] = []
        for row in measured(judged.model, judged.texts, judged.probes):
            rows.append(row)
            print(table(rows).splitlines()[-1], flush=True)
        found = {"machine": machine(), "tier": dataclasses.asdict(TIER), "rows": rows}
        path = settings.results / f"retrieval-{name}-cpu.json"
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        if settings.page:
            fill(page, SECTION, f"\n{table(rows)}\n")


if __name__ == "__main__":
    main()
