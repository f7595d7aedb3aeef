"""Measure the tiny language model: bits per byte against what compressors need, and recall by distance.

`python examples/tiny_lm/evaluate.py --help`; README.md has the numbers.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
import platform
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import data
import model as tiny
import ngram
import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn import functional as F

DISTANCES = (256, 512, 1024)


@torch.no_grad()
def file_bits(
    model: Any, source: data.Source, context: int = 1024, stride: int = 512, rows: int = 8
) -> float:
    """Bits that the model needs for a file.

    Each byte is predicted once, from the `context - stride` tokens before it at least, or from all there are.
    """
    text = torch.from_numpy(data.tokens(source).astype(np.int64))
    starts = range(0, max(1, len(text) - 1 - (context - stride)), stride)
    padded = F.pad(text, (0, starts[-1] + context + 1 - len(text)))
    windows = torch.stack([padded[s : s + context + 1] for s in starts])
    position = torch.arange(1, context + 1) + torch.tensor(starts)[:, None]
    counted = position < len(text)
    counted[1:, : context - stride] = False
    total = 0.0
    for part, mask in zip(windows.split(rows), counted.split(rows), strict=True):
        total += float(_losses(model, part)[mask].double().sum())
    return total / math.log(2)


def _losses(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """Nats for each token but the first, float32 [rows, length - 1]."""
    positions = torch.arange(windows.shape[1] - 1)[None]
    logits = model(input_ids=windows[:, :-1], position_ids=positions, use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none").view(
        len(windows), -1
    )


def bits_per_byte(model: Any, files: Iterable[data.Source], **how: int) -> float:
    files = list(files)
    return sum(file_bits(model, f, **how) for f in files) / sum(len(f.text) for f in files)


def zlib_bits(source: data.Source) -> int:
    return 8 * len(zlib.compress(source.text, 9))


def lzma_bits(source: data.Source) -> int:
    """With the shortest container that lzma has."""
    best = 9 | lzma.PRESET_EXTREME
    return 8 * len(lzma.compress(source.text, format=lzma.FORMAT_ALONE, preset=best))


def recall_cases(
    distance: int, count: int, length: int = 1024, seed: int = 1
) -> tuple[torch.Tensor, list[data.Pair]]:
    """`count` sequences of held-out text, int64 [count, length], each with one pair and decoys in between."""
    text = np.concatenate([data.tokens(s) for s in data.split()[1]])
    rows, pairs = [], []
    for i in range(count):
        rng = np.random.default_rng([seed, distance, i])
        start = int(rng.integers(len(text) - length))
        row = text[start : start + length].copy()
        record = int(rng.integers(0, length - distance + 1))
        pairs.append(data.plant(row, distance, record, rng))
        free = range(record + data.LINE, record + distance - 2 * data.LINE, data.LINE)
        for place in rng.choice(free, size=min(4, len(free)), replace=False):
            data.note(row, int(place), rng)
        rows.append(row.astype(np.int64))
    return torch.from_numpy(np.stack(rows)), pairs


@torch.no_grad()
def recall(model: Any, distance: int, count: int = 64, rows: int = 8) -> float:
    """Share of queries, 0 to 1, whose whole value is the model's first choice, byte after byte."""
    sequences, pairs = recall_cases(distance, count)
    right = 0
    for part, asked in zip(sequences.split(rows), _chunks(pairs, rows), strict=True):
        positions = torch.arange(part.shape[1])[None]
        chosen = model(input_ids=part, position_ids=positions, use_cache=False).logits.argmax(-1)
        for row, choice, pair in zip(part, chosen, asked, strict=True):
            answer = slice(pair.answer, pair.answer + data.VALUE)
            right += bool((choice[pair.answer - 1 : pair.answer + data.VALUE - 1] == row[answer]).all())
    return right / count


def _chunks(items: list[data.Pair], size: int) -> list[list[data.Pair]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def quick_check(model: Any, files: int = 6, size_bytes: int = 3000, count: int = 16) -> dict[str, float]:
    """The figures drawn beside the loss: from the beginnings of a few held-out files, and a few queries."""
    was_training = model.training
    model.eval()
    heads = [data.Source(s.name, s.text[:size_bytes]) for s in data.split()[1][:files]]
    with torch.autocast("cpu", torch.bfloat16):
        found = {"bits_per_byte": bits_per_byte(model, heads)}
        found |= {f"recall_{d}": recall(model, d, count) for d in DISTANCES}
    model.train(was_training)
    return found


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
    """Bits of each held-out file by each method, their sums by byte, and recall."""
    training, held_out = data.split()
    counted = ngram.NGram.train(s.text for s in training)
    files = {
        s.name: {
            "bytes": len(s.text),
            "model": round(file_bits(model, s), 1),
            "zlib_9": zlib_bits(s),
            "lzma": lzma_bits(s),
            "5_gram": round(counted.bits(s.text), 1),
        }
        for s in track(held_out, "held-out files")
    }
    size = sum(f["bytes"] for f in files.values())
    sums = {
        m: round(sum(f[m] for f in files.values()) / size, 4) for m in ("model", "zlib_9", "lzma", "5_gram")
    }
    found = {str(d): recall(model, d, recall_count) for d in track(DISTANCES, "recall")}
    return {"bits_per_byte": sums, "recall": found, "recall_queries": recall_count, "bits": files}


def main(
    folder: Annotated[Path, typer.Option(help="of train.py: holds the weights and training.json")],
    into: Annotated[Path, typer.Option(help="where the checkpoint and its numbers go")] = tiny.CHECKPOINT,
    recall_count: Annotated[int, typer.Option(help="queries a distance")] = 256,
    threads: int = 1,
) -> None:
    torch.set_num_threads(threads)
    model = tiny.read(folder)
    numbers = {
        "sha256": tiny.sha256(folder / tiny.WEIGHTS),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training": json.loads((folder / "training.json").read_text()),
        **measure(model, recall_count),
        "corpus": corpus(),
    }
    into.mkdir(parents=True, exist_ok=True)
    for name in (tiny.WEIGHTS, tiny.CONFIG, "loss.png"):
        shutil.copyfile(folder / name, into / name)
    (into / tiny.NUMBERS).write_text(json.dumps(numbers, indent=1) + "\n")
    table = Table("bits per byte", *numbers["bits_per_byte"], *(f"recall at {d}" for d in numbers["recall"]))
    table.add_row(
        "held out", *map(str, numbers["bits_per_byte"].values()), *map(str, numbers["recall"].values())
    )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
