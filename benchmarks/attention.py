"""Time attention whose mask is known by its form against the same attention with the mask as a tensor.

    python benchmarks/attention.py --json benchmarks/results/attention-cpu.json
    python benchmarks/attention.py --write docs/attention.md --sizes 2048 8192 --head-sizes 64 --from FILE
    python benchmarks/attention.py --training --sizes 1024 4096    # forward and backward
    python benchmarks/attention.py --section block-sparse    # in block_sparse_section.py; --device cuda
    python benchmarks/attention.py --section linear          # in linear_section.py
    python benchmarks/attention.py --section prefill --device cuda    # in prefill_section.py; and decode

Prefill, causal, windowed (with anchors too), with a prefix, chunked and packed (documents in a row, limits as
values), t from 1k to 8k; and a decode step, one query over a static cache of t keys, a quarter written.
Versions: `blocks`, the lowering that computes keys which blocks of queries reach; `sdpa, dense mask`, given
the boolean mask ready made; `sdpa, is_causal`, for a causal mask; with `--flex`, FlexAttention compiled by
Inductor with a block mask ready made. Versions are compared with the op's reference first (at 1k), and then
run in turn; a time is the median of the rounds. On a CPU that is the processor time of the calling thread,
with one thread, so that other work on the machine moves it little. `computed` is the share of all
(query, key) pairs that lie in blocks, `open` the share that the mask leaves: no version does with less.
`GFLOP/s` counts the products of open pairs (3.5 times as many with `--training`), `GB/s` query, open keys,
their values, result; `of ceiling` is the larger of their shares of what this machine reaches in one matrix
product, and in copying 256 MB.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import sections
import torch
from page import fill
from sections import about
from timing import ceilings, medians
from torch import Tensor
from torch.nn import functional as F

from effopt.backends.block_attention import block_attention
from effopt.backends.key_blocks import Call, blocks_of
from effopt.backends.known_rows import rows_of
from effopt.bench import machine
from effopt.graph import ops
from effopt.graph.ops.attention import open_keys

SIZES = (1024, 2048, 4096, 8192)
HEAD_SIZES = (64, 128)
HEADS, KV_HEADS = 8, 8
KINDS = (
    *("causal", "window 256", "window 256 anchors 4", "window 1024", "prefix 512"),
    *("chunks 512", "documents 512", "decode"),
)
SECTION = "<!-- written by benchmarks/attention.py -->"
TRAINING = "<!-- written by benchmarks/attention.py --training -->"


@dataclass(frozen=True)
class Measurement:
    """One version of one attention."""

    kind: str
    t: int
    d: int
    version: str
    milliseconds: float
    ratio: float
    """How many times as fast as SDPA with a dense mask."""
    computed: float
    open: float
    gflops_per_s: float
    gbytes_per_s: float
    of_ceiling: float


def facts(kind: str, t: int, device: torch.device) -> dict[str, Any]:
    """What the op is told of a mask."""
    name, _, number = kind.partition(" ")
    if name == "causal":
        return {"high": 0}
    if name == "window":
        width, _, anchors = number.partition(" anchors ")
        return {"low": 1 - int(width), "high": 0, **({"anchors": int(anchors)} if anchors else {})}
    if name == "prefix":
        return {"high": 0, "prefix": int(number)}
    if name == "decode":
        return {"mask": (torch.arange(t, device=device) < t // 4)[None, None, None]}
    if name == "chunks":
        ids = torch.arange(t, device=device) // int(number)
    else:
        lengths = torch.randint(1, 2 * int(number), (t,), generator=torch.Generator().manual_seed(0))
        ids = torch.repeat_interleave(torch.arange(t), lengths)[:t].to(device)
    return {"high": 0, "query_ids": ids[None], "key_ids": ids[None]}


def shares(q: Tensor, k: Tensor, told: dict[str, Any], mask: Tensor) -> tuple[float, float]:
    """Shares of all pairs: those in blocks, and those that the mask leaves open."""
    given = {
        "low": -q.shape[-2],
        "high": k.shape[-2],
        "anchors": 0,
        "prefix": 0,
        "query_ids": None,
        "key_ids": None,
        "bias": None,
        "mask": None,
        "sinks": None,
    }
    settings = {"scale": 1.0, "fill": 0.0, "softcap": 0.0, "zero_masked_rows": False, "rows_see_key": True}
    call = Call(q, k, k, **(given | settings | told))
    length = lambda x: x.stop - x.start  # noqa: E731
    spans = [rows.pairs for rows in rows_of(call)]
    left = (rows for rows in rows_of(call) if not rows.ranges)
    blocks = (block for rows in left for block in blocks_of(call, rows.batch, rows.queries))
    spans += [length(b.queries) * length(keys) for b in blocks for _, keys in b.segments]
    return sum(spans) / mask.numel(), float(mask.float().mean())


def versions(
    kind: str, operands: tuple[Tensor, Tensor, Tensor], told: dict[str, Any], mask: Tensor, flex: bool
) -> dict[str, Callable[[], Tensor]]:
    """By name, the baseline first."""
    q, k, v = operands
    scale = q.shape[-1] ** -0.5
    found: dict[str, Callable[[], Tensor]] = {
        "sdpa, dense mask": lambda: F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    }
    if q.device.type == "cpu":
        found["blocks"] = lambda: block_attention(q, k, v, scale=scale, rows_see_key=True, **told)
    if kind == "causal":
        found["sdpa, is_causal"] = lambda: F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale
        )
    if flex:
        found["flex"] = compiled_flex(operands, mask.reshape(mask.shape[-2:]), scale)
    return found


def compiled_flex(
    operands: tuple[Tensor, Tensor, Tensor], mask: Tensor, scale: float
) -> Callable[[], Tensor]:
    """FlexAttention with the block mask of a tensor, both made before it is timed."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    t, s = mask.shape
    is_open = lambda b, h, i, j: mask[i, j]  # noqa: E731
    blocks = create_block_mask(is_open, None, None, t, s, device=str(mask.device))
    torch._dynamo.reset()  # a row is a compilation, and past the eighth the library runs it uncompiled
    run = torch.compile(flex_attention, dynamic=False)
    return lambda: run(*operands, block_mask=blocks, scale=scale)


def with_gradients(call: Callable[[], Tensor], operands: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """Forward, and backward to query, key and value."""
    direction = torch.randn(operands[0].shape, device=operands[0].device)

    def run() -> Tensor:
        with torch.enable_grad():
            out = call()
            torch.autograd.grad(out, operands, direction)
        return out.detach()

    return run


def measure(
    kind: str, t: int, d: int, device: torch.device, rounds: int, wanted: argparse.Namespace, most: Any
) -> Iterator[Measurement]:
    """All versions of one attention, in turn."""
    queries = 1 if kind == "decode" else t
    shapes = ((1, HEADS, queries, d), (1, KV_HEADS, t, d), (1, KV_HEADS, t, d))
    q, k, v = (torch.randn(shape, device=device) for shape in shapes)
    told = facts(kind, t, device)
    mask = told["mask"] if "mask" in told else open_keys(t, t, device, **told)
    assert mask is not None
    computed, left = shares(q, k, told, mask)
    if wanted.training:
        q, k, v = (x.requires_grad_() for x in (q, k, v))
    calls = versions(kind, (q, k, v), told, mask, wanted.flex)
    if wanted.training:
        calls = {name: with_gradients(call, (q, k, v)) for name, call in calls.items()}
    if t == SIZES[0]:
        exact = ops.attention.reference(q, k, v, scale=d**-0.5, **told)
        for call in calls.values():
            torch.testing.assert_close(call(), exact, rtol=1e-4, atol=1e-4)
    times = medians(calls, device, rounds, again=20 if kind == "decode" else 1)
    base = times["sdpa, dense mask"]
    flops = 4.0 * HEADS * queries * t * d * left * (3.5 if wanted.training else 1.0)
    seen = float(mask.reshape(-1, t).any(0).sum()) / t
    bytes_ = 4.0 * d * (2 * HEADS * queries + 2 * KV_HEADS * t * seen)
    for name, seconds in times.items():
        share = computed if name == "blocks" else (0.5 if name == "sdpa, is_causal" else 1.0)
        share = left if name == "flex" else share
        reached = flops / seconds, bytes_ / seconds
        of = max(reached[0] / most[0], reached[1] / most[1])
        ratio = base / seconds
        yield Measurement(
            *(kind, t, d, name, 1e3 * seconds, ratio, share, left),
            *(reached[0] / 1e9, reached[1] / 1e9, of),
        )


def table(measurements: list[dict[str, Any]], heading: str) -> str:
    """As Markdown."""
    head = "| mask | t | d | version | ms | times as fast | computed | open | GFLOP/s | GB/s | of ceiling |\n"
    head += "|---|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|\n"
    rows = [
        f"| {m['kind']} | {m['t']} | {m['d']} | {m['version']} | {m['milliseconds']:.1f} | {m['ratio']:.2f} |"
        f" {m['computed']:.3f} | {m['open']:.3f} | {m['gflops_per_s']:.1f} | {m['gbytes_per_s']:.1f} |"
        f" {m['of_ceiling']:.2f} |"
        for m in measurements
    ]
    return f"{heading}\n\n{head}" + "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--section", choices=("masks", *sections.SECTIONS), default="masks")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sizes", type=int, nargs="+", help="tokens; each section has its own")
    parser.add_argument("--head-sizes", type=int, nargs="+")
    parser.add_argument("--kinds", nargs="+", default=KINDS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, help="begin no further shape after so long; not for masks")
    parser.add_argument("--flex", action="store_true", help="FlexAttention too; compiles once a row")
    parser.add_argument("--training", action="store_true", help="forward and backward; not for decode")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--from", type=Path, dest="source", help="take the numbers of an earlier --json")
    parser.add_argument("--write", type=Path, help="a page whose table is replaced")
    arguments = parser.parse_args()
    if arguments.section in sections.SECTIONS:
        if arguments.source:
            parser.error("--from is for section masks")
        sections.run(arguments)
        return
    if arguments.training and "decode" in arguments.kinds:
        arguments.kinds = [kind for kind in arguments.kinds if kind != "decode"]
    arguments.sizes, arguments.head_sizes = arguments.sizes or SIZES, arguments.head_sizes or HEAD_SIZES
    if arguments.source:
        found = json.loads(arguments.source.read_text("utf-8"))
        wanted = (arguments.kinds, arguments.sizes, arguments.head_sizes)
        found["measurements"] = [
            m
            for m in found["measurements"]
            if all(m[name] in allowed for name, allowed in zip(("kind", "t", "d"), wanted, strict=True))
        ]
    else:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        device, done = torch.device(arguments.device), []
        most = ceilings(device)
        with torch.no_grad():
            for kind in arguments.kinds:
                for t in arguments.sizes:
                    for d in arguments.head_sizes:
                        made = measure(kind, t, d, device, arguments.rounds, arguments, most)
                        done += [asdict(m) for m in made]
        reached = {"matmul_flops_per_s": most[0], "copy_bytes_per_s": most[1]}
        found = {
            "machine": machine(),
            "ceilings": reached,
            "heads": HEADS,
            "rounds": arguments.rounds,
            "measurements": done,
        }
    text = table(found["measurements"], about(found))
    print(text)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if arguments.write:
        fill(arguments.write, TRAINING if arguments.training else SECTION, text)


if __name__ == "__main__":
    main()
