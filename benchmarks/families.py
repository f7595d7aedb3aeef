"""One pass of each lossy family, alone and together, on a Llama of 300 M parameters.

    python benchmarks/families.py --json benchmarks/results/families-cpu.json

Each way is a process of its own, so that the memory it holds is its own; all are compiled first and then
measured in turns, one at a time. `resident` is what the process holds beyond what it held before the
model was built (VmRSS, freed pages returned first; some 300 MB are PyTorch's own, mostly of compiling),
`weights` the bytes of the tensors that the model and its graphs keep, `KV` those of the cache. FLOPs are of
one prefill and one decode step. Speeds are medians over rounds of decoding with a cache
of fixed size, batch 1. Random weights: what a pass costs in quality is not measured here.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

HALF, PAIRS = "skip-layers{keep=0.5}", "share-kv-across-layers{group=2}"
INT8, INT4 = "quantize-weights{bits=8}", "quantize-weights{bits=4,group=128}"
WAYS: dict[str, tuple[str, str]] = {
    "eager": ("", ""),
    "inductor": ("", ""),
    "effopt": ("", ""),
    "8 bits": ("", INT8),
    "4 bits": ("", INT4),
    "8 bits, activations too": ("", f"{INT8},quantize-activations"),
    "half the layers": (HALF, ""),
    "shared in pairs": (PAIRS, ""),
    "4 bits, half, pairs": (f"{HALF},{PAIRS}", INT4),
}
"""Name -> passes that decide by layer, and passes that quantise."""


def resident_bytes() -> int:
    """What the process holds in memory, after giving free pages back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def build(settings: argparse.Namespace) -> Any:
    """The model, the same in every process."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=settings.hidden,
        intermediate_size=settings.hidden * 11 // 4,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.hidden // 64,
        num_key_value_heads=settings.hidden // 128,
        vocab_size=settings.vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    with torch.device("cpu"):
        model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    return model.to(getattr(torch, settings.dtype))


class Runner:
    """A compiled model with a filled cache, ready to decode."""

    def __init__(self, name: str, settings: argparse.Namespace) -> None:
        import torch

        import effopt
        from effopt.decoding import Decoder

        torch.set_num_threads(settings.threads)
        before = resident_bytes()
        model = self.model = build(settings)
        self.parameters = sum(p.numel() for p in model.parameters())
        length = settings.prompt + settings.steps * (settings.rounds + 3) + 1
        ids = torch.randint(0, settings.vocabulary, (1, settings.prompt))
        layerwise, quantize = WAYS[name]
        plan = effopt.Plan(())
        options: dict[str, Any] = {}
        if layerwise:
            plan = effopt.calibrate(model, [{"input_ids": ids, "use_cache": False}], layerwise)
            options["plans"] = plan
        if quantize:
            options |= {"passes": quantize, "release_weights": True}
        cache = effopt.cache_for(model, plan, max_cache_len=length)
        call = model.forward
        start = time.perf_counter()
        with effopt.record() as self.report:
            if name != "eager":
                backend = "inductor" if name == "inductor" else "effopt"
                extra = {"options": options} if backend == "effopt" else {}
                call = torch.compile(model.forward, backend=backend, dynamic=False, **extra)
            self.decoder = Decoder(call, cache, ids, length)
            self.decoder.decode(3)
        self.compile_s = time.perf_counter() - start
        self.resident = resident_bytes() - before

    def facts(self) -> dict[str, Any]:
        """Everything but the speed."""
        from effopt.decoding import weight_bytes

        graphs = [g for g in self.report.graphs if g.cost]
        return {
            "parameters": self.parameters,
            "weight_bytes": weight_bytes(self.model),
            "resident_bytes": self.resident,
            "kv_bytes": self.decoder.kv_bytes,
            "prefill_flops": graphs[0].cost["flops_after"] if graphs else None,
            "decode_flops": graphs[-1].cost["flops_after"] if graphs else None,
            "compile_s": self.compile_s,
            "lowerings": sorted(
                {f"{r.op}: {r.kernel}" for r in self.report.lowerings if "quant" in r.op or "int8" in r.op}
            ),
            "faults": self.report.faults,
        }


def serve(name: str, settings: argparse.Namespace, pipe: Connection) -> None:
    """The process of one way: builds, says what it holds, and then decodes whenever it is asked."""
    runner = Runner(name, settings)
    pipe.send(runner.facts())
    while pipe.recv():
        pipe.send(runner.decoder.seconds_a_token(settings.steps))


def main() -> None:
    """Start every way, measure in turns, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(WAYS))
    parser.add_argument("--json", type=Path)
    settings = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name in settings.only:
        ours, theirs = context.Pipe()
        context.Process(target=serve, args=(name, settings, theirs), daemon=True).start()
        facts[name], pipes[name] = ours.recv(), ours
        print(f"compiled {name}: {facts[name]['compile_s']:.0f} s", flush=True)
    times: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(settings.rounds):
        for name, pipe in pipes.items():
            pipe.send(True)
            times[name].append(pipe.recv())
    rows = [
        {"name": n, **facts[n], "tokens_per_s": 1 / statistics.median(times[n]), "decode_s": times[n]}
        for n in pipes
    ]
    for pipe in pipes.values():
        pipe.send(False)
    print_table(rows)
    if settings.json:
        from effopt.bench import machine

        given = {k: v for k, v in vars(settings).items() if k not in ("json", "only")}
        settings.json.write_text(
            json.dumps({"machine": machine(), "settings": given, "rows": rows}, indent=1)
        )


def print_table(rows: list[dict[str, Any]]) -> None:
    """Bytes, FLOPs and speed of each way, speed also against the `effopt` way of the same run."""
    exact = next((r for r in rows if r["name"] == "effopt"), rows[0])
    print(f"{rows[0]['parameters'] / 1e6:.0f} M parameters")
    heads = ("weights MB", "resident MB", "KV MB", "prefill GFLOP", "decode GFLOP", "tokens/s", "speed-up")
    print(f"{'':<26}" + "".join(f"{h:>15}" for h in heads))
    for r in rows:
        flops = [f"{r[k] / 1e9:.2f}" if r[k] else "" for k in ("prefill_flops", "decode_flops")]
        cells = [
            f"{r['weight_bytes'] / 1e6:.0f}",
            f"{r['resident_bytes'] / 1e6:.0f}",
            f"{r['kv_bytes'] / 1e6:.2f}",
            *flops,
            f"{r['tokens_per_s']:.2f}",
            f"{r['tokens_per_s'] / exact['tokens_per_s']:.2f}",
        ]
        print(f"{r['name']:<26}" + "".join(f"{c:>15}" for c in cells))


if __name__ == "__main__":
    main()
