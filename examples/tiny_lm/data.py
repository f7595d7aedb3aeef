"""What the tiny language model reads: the source of Python's standard library, and lines to be recalled.

Everything here is a function of its arguments: a step's batch can be made again without the steps before it,
on any machine that has the same Python version.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

BEGIN = 256
"""The token before the first byte of a file; the others are the 256 bytes."""
VOCAB = 264
"""Bytes and BEGIN, rounded up to a multiple of eight: the last seven never occur."""

SKIPPED = {"site-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
"""Folders left out. Tests, because many systems ship Python without them. encodings, because a hundred
generated character tables are so alike that those held out would already be known."""
HELD_OUT_ONE_IN = 16

KEY, VALUE = 4, 16
"""Symbols of a key and of a value, which follows its key at once."""
SYMBOLS = np.arange(128, 256, dtype=np.uint8)
"""Bytes that source code hardly has. No symbol is in two notes of a sequence: each says what comes next."""
RECORD, QUERY = b"\n# note ", b"\n# recall "
LINE = len(RECORD) + KEY + VALUE + 1
"""Bytes of a record line, from its first line feed to its last; the query is two longer."""
SHORTEST = 2 * LINE + 2
"""The shortest distance: a record, and its query right after it."""


@dataclass(frozen=True)
class Source:
    """One file: its path below the standard library's folder, and its bytes."""

    name: str
    text: bytes

    @property
    def is_held_out(self) -> bool:
        """Decided by the name alone, so that a file is on the same side in every Python version."""
        return int(hashlib.sha256(self.name.encode()).hexdigest()[:8], 16) % HELD_OUT_ONE_IN == 0


@cache
def sources() -> tuple[Source, ...]:
    """The `.py` files of the running Python's standard library that are UTF-8, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED & set(name.parts):
            continue
        text = path.read_bytes()
        try:
            text.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            found.append(Source(name.as_posix(), text))
    return tuple(found)


def split() -> tuple[list[Source], list[Source]]:
    """(training files, held-out files)."""
    every = sources()
    return [s for s in every if not s.is_held_out], [s for s in every if s.is_held_out]


def tokens(source: Source) -> np.ndarray:
    """BEGIN and the bytes, int16."""
    return np.concatenate([[BEGIN], np.frombuffer(source.text, dtype=np.uint8)]).astype(np.int16)


@cache
def training_tokens() -> np.ndarray:
    """All training files end to end, in an order that mixes the packages (that of their names' hashes)."""
    files = sorted(split()[0], key=lambda s: hashlib.sha256(s.name.encode()).digest())
    return np.concatenate([tokens(s) for s in files])


@cache
def _order(seed: int, length: int, epoch: int) -> tuple[int, np.ndarray]:
    """One epoch's shift of the window grid, and the order of its windows."""
    rng = np.random.default_rng([seed, length, epoch])
    return int(rng.integers(length)), rng.permutation(len(training_tokens()) // length - 2)


def window(seed: int, length: int, index: int) -> np.ndarray:
    """The index-th window of `length` + 1 tokens: every token once per epoch, in a new order each epoch."""
    count = len(training_tokens()) // length - 2
    shift, order = _order(seed, length, index // count)
    start = shift + int(order[index % count]) * length
    return training_tokens()[start : start + length + 1]


@dataclass(frozen=True)
class Pair:
    """A record line and its query in a sequence of tokens."""

    record: int
    """Where the record line begins."""
    answer: int
    """Where the value in the query line begins; it ends VALUE tokens later."""

    @property
    def distance(self) -> int:
        """Tokens from the record's first to the answer's last: the context that an answer needs."""
        return self.answer + VALUE - self.record


def draw_symbols(rng: np.random.Generator) -> list[bytes]:
    """A key and a value in one, for each note that a sequence can have: no symbol occurs twice."""
    drawn = rng.permutation(SYMBOLS).tobytes()
    size = KEY + VALUE
    return [drawn[at : at + size] for at in range(0, len(drawn) - size + 1, size)]


def write(text: np.ndarray, at: int, line: bytes) -> None:
    """Put a line into `text`, as much of it as fits."""
    fits = text[at : at + len(line)]
    fits[:] = np.frombuffer(line, dtype=np.uint8)[: len(fits)]


def plant(text: np.ndarray, distance: int, record: int, symbols: bytes) -> Pair:
    """Write, in place, a record line at `record`, and its query such that the answer ends `distance` on."""
    end = record + distance
    if distance < SHORTEST:
        raise ValueError(f"distance {distance} is too short for a record and a query: {SHORTEST} at least")
    if record < 0 or end > len(text):
        raise ValueError(f"a pair from {record} to {end} does not fit {len(text)} tokens")
    write(text, record, RECORD + symbols + b"\n")
    write(text, end - len(QUERY) - len(symbols), QUERY + symbols + b"\n")
    return Pair(record, end - VALUE)


def recall_sequence(text: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, list[Pair]]:
    """`text` with up to `count` notes, each asked for up to twice; no line covers another.

    Places are random, distances log-uniform.
    """
    text, pairs, taken = text.copy(), [], np.zeros(len(text) + 1, dtype=bool)
    for symbols in draw_symbols(rng)[:count]:
        record = None
        for _ in range(8):
            distance = int(np.exp(rng.uniform(np.log(SHORTEST), np.log(len(text)))))
            start = int(rng.integers(0, len(text) - distance + 1)) if record is None else record
            query = slice(start + distance - LINE - 1, start + distance + 1)
            own = slice(start, start + LINE)
            if query.stop > len(taken) or taken[query].any() or (record is None and taken[own].any()):
                continue
            taken[own] = taken[query] = True
            pairs.append(plant(text, distance, start, symbols))
            if record is not None:
                break
            record = start
    return text, pairs


def weights(length: int, pairs: list[Pair], answer_weight: float) -> np.ndarray:
    """What each token but the first counts in the loss, float32 [length - 1].

    0 for what nobody could know, the keys and values of record lines; `answer_weight` for the answers.
    """
    counts = np.ones(length, dtype=np.float32)
    for pair in pairs:
        start = pair.record + len(RECORD)
        counts[start : start + KEY + VALUE] = 0
        counts[pair.answer : pair.answer + VALUE] = answer_weight
    return counts[1:]


def batch(
    seed: int, step: int, size: int, length: int, first: int, recall_share: float, answer_weight: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step's (tokens, int64 [size, length + 1]; weights of all but the first, float32 [size, length]).

    `first` counts the windows read before this step; `recall_share` is the chance that a sequence holds
    notes and queries, one note for every 160 tokens.
    """
    rng = np.random.default_rng([seed, step])
    rows, counts = [], []
    for i in range(size):
        text, pairs = window(seed, length, first + i), []
        if rng.random() < recall_share:
            text, pairs = recall_sequence(text, max(1, length // 160), rng)
        rows.append(text.astype(np.int64))
        counts.append(weights(len(text), pairs, answer_weight))
    return torch.from_numpy(np.stack(rows)), torch.from_numpy(np.stack(counts))
