"""Measure the tiny language model: bits per byte against what compressors need, and recall by distance.

`python examples/tiny_lm/evaluate.py --help`; README.md has the numbers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import lzma
import math
import platform
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import data
import model as tiny
import ngram
import numpy as np
import torch
import typer

from effopt.testing import quality

DISTANCES = (256, 512, 1024)
TIER = quality.Tier(stride=768)
"""All of the held-out files, each byte predicted from 256 bytes at least, or from all there are."""


def zlib_bits(source: data.Source) -> int:
    return 8 * len(zlib.compress(source.text, 9))


def lzma_bits(source: data.Source) -> int:
    """With the shortest container that lzma has."""
    best = 9 | lzma.PRESET_EXTREME
    return 8 * len(lzma.compress(source.text, format=lzma.FORMAT_ALONE, preset=best))


def held_out_texts() -> list[quality.Text]:
    """The held-out files, for `effopt.testing.quality.evaluate`."""
    return [quality.Text(s.name, torch.from_numpy(data.tokens(s).astype(np.int64))) for s in data.split()[1]]


def recall_probes(
    count: int, distances: Sequence[int] = DISTANCES, length: int = 1024
) -> list[quality.Probe]:
    """`count` a distance: held-out text with a record line, decoys after it, and its query."""
    text = np.concatenate([data.tokens(s) for s in data.split()[1]])
    return [recall_probe(text, distance, length, i) for distance in distances for i in range(count)]


def recall_probe(text: np.ndarray, distance: int, length: int, index: int) -> quality.Probe:
    """The index-th probe of a distance, cut from `text`; four decoys stand between note and query."""
    rng = np.random.default_rng([1, distance, index])
    start = int(rng.integers(len(text) - length))
    row = text[start : start + length].copy()
    record = int(rng.integers(0, length - distance + 1))
    asked, *decoys = data.draw_symbols(rng)
    pair = data.plant(row, distance, record, asked)
    free = range(record + data.LINE, record + distance - 2 * data.LINE, data.LINE)
    for place, symbols in zip(rng.choice(free, size=4, replace=False), decoys, strict=False):
        data.write(row, int(place), data.RECORD + symbols + b"\n")
    tokens = torch.from_numpy(row.astype(np.int64))
    return quality.Probe(tokens, (pair.answer, pair.answer + data.VALUE), distance)


def language_model() -> tuple[Any, list[quality.Text], list[quality.Probe]]:
    """For `effopt bench quality examples/tiny_lm/evaluate.py:language_model`, and whatever judges a model."""
    return tiny.load(), held_out_texts(), recall_probes(32)


def quick_check(model: Any) -> dict[str, float]:
    """The figures drawn beside the loss: the beginnings of six held-out files, sixteen queries a distance."""
    was_training = model.training
    model.eval()
    tier = quality.Tier(texts=6, tokens_per_text=3000, resamples=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = quality.evaluate(model, held_out_texts(), probes=recall_probes(16), tier=tier)
    model.train(was_training)
    return {name: interval.value for name, interval in found.metrics.items()}


def corpus() -> dict[str, Any]:
    """What the numbers were measured on: anyone can see whether theirs is the same."""
    training, held_out = data.split()
    digest = hashlib.sha256("".join(hashlib.sha256(s.text).hexdigest() for s in training).encode())
    return {
        "python": platform.python_version(),
        "training_files": len(training),
        "training_bytes": sum(len(s.text) for s in training),
        "training_sha256": digest.hexdigest(),
        "held_out_bytes": sum(len(s.text) for s in held_out),
        "held_out_sha256": {s.name: hashlib.sha256(s.text).hexdigest() for s in held_out},
    }


def measure(model: Any, recall_count: int) -> dict[str, Any]:
    """Bits of each held-out file by each method, their sums by byte, and recall.

    The model runs as it was trained: matrix products in bfloat16, the rest in float32.
    """
    training, held_out = data.split()
    probes = recall_probes(recall_count)
    with torch.autocast("cpu", torch.bfloat16):
        found = quality.evaluate(model, held_out_texts(), probes=probes, tier=TIER)
    counted = ngram.NGram.train(s.text for s in training)
    files = {
        s.name: {
            "bytes": len(s.text),
            "model": round(counts.nats / math.log(2), 1),
            "zlib_9": zlib_bits(s),
            "lzma": lzma_bits(s),
            "5_gram": round(counted.bits(s.text), 1),
        }
        for s, counts in zip(held_out, found.texts, strict=True)
    }
    size = sum(f["bytes"] for f in files.values())
    sums = {
        m: round(sum(f[m] for f in files.values()) / size, 4) for m in ("model", "zlib_9", "lzma", "5_gram")
    }
    metrics = {name: dataclasses.asdict(interval) for name, interval in found.metrics.items()}
    return {"bits_per_byte": sums, "metrics": metrics, "recall_queries": recall_count, "bits": files}


def main(
    folder: Annotated[Path, typer.Option(help="of train.py: holds the weights and training.json")],
    into: Annotated[Path, typer.Option(help="where the checkpoint and its numbers go")] = tiny.CHECKPOINT,
    recall_count: Annotated[int, typer.Option(help="queries a distance")] = 128,
    backend: Annotated[str, typer.Option(help="of torch.compile; eager compiles nothing")] = "inductor",
    threads: int = 1,
) -> None:
    torch.set_num_threads(threads)
    model = tiny.read(folder)
    compiled = model if backend == "eager" else torch.compile(model, backend=backend, dynamic=False)
    numbers = {
        "sha256": tiny.sha256(folder / tiny.WEIGHTS),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training": json.loads((folder / "training.json").read_text()),
        **measure(compiled, recall_count),
        "corpus": corpus(),
    }
    into.mkdir(parents=True, exist_ok=True)
    for name in (tiny.WEIGHTS, tiny.CONFIG):
        shutil.copyfile(folder / name, into / name)
    if (folder / "loss.png").is_file():
        shutil.copyfile(folder / "loss.png", into / "loss.png")
    (into / tiny.NUMBERS).write_text(json.dumps(numbers, indent=1) + "\n")
    (into / tiny.SHA256).write_text(f"{numbers['sha256']}  {tiny.WEIGHTS}\n")
    for method, bits in numbers["bits_per_byte"].items():
        print(f"{method:>14}  {bits} bits per byte of held-out files")
    for name, interval in numbers["metrics"].items():
        print(f"{name:>14}  {interval['value']:.4f} [{interval['low']:.4f}, {interval['high']:.4f}]")


if __name__ == "__main__":
    typer.run(main)
