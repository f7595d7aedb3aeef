"""What streaming heads cost the trained tiny language model, and what its cache then holds.

    python benchmarks/split_heads_quality.py          # some ten minutes on two cores
    python benchmarks/split_heads_quality.py --page   # and the table of docs/compressing.md

For each share of retrieval heads and each window a plan is calibrated on training text, then held-out text is
judged under it, compiled as `torch.compile(model, backend="effopt")` does; the table names the kernels that
its attentions ran. Attention recall: of the weight that the dense model gives to all keys, the share that it
gives to keys which its heads still see; the mean over queries, heads and layers, of the same texts. KV bytes
are those of the storages of a cache of 1,024 tokens after a prompt of 768 ones and 32 decoded ones, batch 1;
the tokens must be those of the same model over an ordinary cache, whose streaming heads are masked; both are
read without Inductor. Nothing is timed. The model has not learned to recall, so what retrieval heads are for
shows in its bits per byte only in part.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from page import fill
from torch import Tensor
from transformers import StaticCache

import effopt
from effopt.bench import machine
from effopt.decoding import Decoder
from effopt.testing import quality

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "split-heads-tiny-lm-cpu.json"
PAGE = ROOT / "docs" / "compressing.md"
SECTION = "<!-- written by benchmarks/split_heads_quality.py -->"
WAYS = [(1.0, 64), (0.75, 64), (0.5, 64), (0.25, 64), (0.0, 64), (0.5, 256), (0.0, 256)]
"""(share of the KV heads that see all keys, last tokens that the others see)."""
SINK, LENGTH, PROMPT, STEPS = 4, 1024, 768, 32


def compiled(model: Any, plan: Any, lowering: str = "auto") -> Any:
    """The model under a plan."""
    torch._dynamo.reset()
    options = {"plans": plan, "lowering": lowering}
    return torch.compile(copy.deepcopy(model).forward, backend="effopt", dynamic=False, options=options)


@dataclass(frozen=True)
class Judge:
    """A model, and what its plans are measured on."""

    model: Any
    texts: Sequence[quality.Text]
    probes: Sequence[quality.Probe] = ()
    tier: quality.Tier = quality.QUICK
    prompt: int = PROMPT
    length: int = LENGTH
    """Tokens of the prompt that a cache is filled from, and tokens that it has room for."""


@torch.no_grad()
def attention_recall(judge: Judge, plan: Any) -> float:
    """Share of the dense model's weights that lie on keys which its heads see under a plan."""
    dense = copy.deepcopy(judge.model)
    dense.set_attn_implementation("eager")
    length, config = judge.tier.context, dense.config
    rows = [t.tokens[:length] for t in judge.texts if len(t.tokens) >= length][: quality.QUICK.texts]
    group = config.num_attention_heads // config.num_key_value_heads
    kept = []
    for row in rows:
        attentions = dense(row[None], output_attentions=True).attentions
        for weights, entry in zip(attentions, entries(plan), strict=True):
            by_head = torch.ones(weights.shape[1], dtype=torch.float64)
            for head in (entry.decision or {}).get("streaming", ()):
                seen = seen_by_streaming(length, entry.decision["sink"], entry.decision["recent"])
                these = slice(head * group, (head + 1) * group)
                by_head[these] = (weights[0, these].double() * seen).sum(-1).mean(-1)
            kept.append(float(by_head.mean()))
    return sum(kept) / len(kept)


def seen_by_streaming(length: int, sink: int, recent: int) -> Tensor:
    """Which keys a query of a streaming head sees, causality aside: bool `[length, length]`."""
    at = torch.arange(length)
    return (at < sink) | (at > at.unsqueeze(-1) - recent)


def measure(judge: Judge, plan: Any) -> dict[str, Any]:
    """What a plan costs in quality, and the kernels that ran."""
    model = judge.model
    with torch.no_grad(), effopt.record() as report:
        found = quality.evaluate(
            compiled(model, plan), judge.texts, reference=model, probes=judge.probes, tier=judge.tier
        )
    ran = [low.kernel for graph in report.graphs for low in graph.lowerings if low.op == "attention"]
    assert len(ran) >= model.config.num_hidden_layers * len(report.graphs), ran
    assert "reference" not in ran, ran
    return {
        "streaming_kv_heads": sum(len((e.decision or {}).get("streaming", ())) for e in entries(plan)),
        "kernels": sorted(set(ran)),
        "attention_recall": attention_recall(judge, plan),
        **{name: vars(interval) for name, interval in found.metrics.items()},
    }


def held(judge: Judge, plan: Any) -> dict[str, int]:
    """Bytes of the plan's cache, and of an ordinary one, once both gave the same tokens."""
    model, length = judge.model, judge.length
    prompt = judge.texts[0].tokens[None, : judge.prompt]
    tokens, kv_bytes = [], []
    for is_split in (True, False):
        cache: Any = effopt.cache_for(model, plan, max_cache_len=length)
        forward = compiled(model, plan, "eager")  # the tokens and the bytes, which no kernel changes
        decoder = Decoder(forward, cache if is_split else StaticCache(model.config, length), prompt, length)
        tokens.append([int(decoder.decode(1)) for _ in range(STEPS)])
        kv_bytes.append(decoder.kv_bytes)
    if tokens[0] != tokens[1]:
        raise SystemExit(f"the two caches give other tokens under\n{plan}")
    return {"kv_bytes": kv_bytes[0], "ordinary_kv_bytes": kv_bytes[1]}


def entries(plan: Any) -> Any:
    """The layers of a plan of this pass alone."""
    return plan.sections[0].entries


def as_table(result: dict[str, Any]) -> str:
    """The rows in Markdown."""
    lines = [
        f"{result['parameters'] / 1e6:.2f} M parameters, float32, torch {result['machine']['torch']};"
        f" sink {SINK}; {result['kv_heads']} KV heads in all; a cache of {LENGTH} tokens, batch 1.",
        "",
        "| `retrieval` | `recent` | kernels | attention recall | bits per byte | KL, nats a token |"
        " agreement | KV bytes | of ordinary |",
        "| --: | --: | --- | --: | --: | --: | --: | --: | --: |",
    ]
    lines += [
        f"| {row['retrieval']} | {row['recent']} | {', '.join(row['kernels'])} |"
        f" {row['attention_recall']:.4f} | {row['bits_per_byte']['value']:.4f} |"
        f" {max(row['kl']['value'], 0.0):.4f} | {row['agreement']['value']:.4f} | {row['kv_bytes']:,} |"
        f" {row['kv_bytes'] / row['ordinary_kv_bytes']:.3f} |"
        for row in result["rows"]
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="refresh the table of docs/compressing.md")
    parser.add_argument("--ways", type=int, nargs="+", default=range(len(WAYS)), help="rows, from 0")
    settings = parser.parse_args()
    sys.path.insert(0, str(ROOT / "examples" / "tiny_lm"))
    import data
    import evaluate
    import model as tiny
    import numpy as np

    model, texts = tiny.load(), evaluate.held_out_texts()
    training = [data.tokens(source).astype(np.int64) for source in data.split()[0]]
    long = [torch.from_numpy(tokens[:LENGTH]) for tokens in training if len(tokens) >= LENGTH][:16]
    batches = [torch.stack(long[i : i + 4]) for i in range(0, len(long), 4)]
    heads = model.config.num_hidden_layers * model.config.num_key_value_heads
    result: dict[str, Any] = {
        "machine": machine(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "kv_heads": heads,
        "rows": [],
    }
    for share, recent in (WAYS[i] for i in settings.ways):
        spec = f"split-heads-by-role{{retrieval={share},sink={SINK},recent={recent}}}"
        judge, plan = Judge(model, texts), effopt.calibrate(model, batches, spec)
        row = {"retrieval": share, "recent": recent, **measure(judge, plan), **held(judge, plan)}
        result["rows"].append(row)
        print(as_table(result).splitlines()[-1], flush=True)
    settings.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if settings.page:
        fill(PAGE, SECTION, f"\n{as_table(result)}\n")


if __name__ == "__main__":
    main()
