"""A byte 5-gram model, interpolated as Witten and Bell do: what counting alone predicts.

    p_n(c | h) = (count(h c) + distinct(h) p_{n-1}(c | h without its first byte)) / (count(h) + distinct(h))

down to p_0 = 1/256. Source: Witten and Bell 1991, IEEE Trans. Information Theory 37(4), method C.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


def windows(text: bytes, order: int) -> np.ndarray:
    """For each byte the number that the `order` bytes up to it make, uint64; zeros stand before the text."""
    padded = np.frombuffer(bytes(order - 1) + text, dtype=np.uint8).astype(np.uint64)
    codes = np.zeros(len(text), dtype=np.uint64)
    for i in range(order):
        codes = (codes << np.uint64(8)) | padded[i : i + len(text)]
    return codes


@dataclass(frozen=True)
class Table:
    """Counts of one order: all arrays are sorted by their codes, so that a lookup is a binary search."""

    grams: np.ndarray
    counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    distinct: np.ndarray

    @classmethod
    def count(cls, codes: np.ndarray) -> Table:
        grams, counts = np.unique(codes, return_counts=True)
        contexts, first, distinct = np.unique(grams >> np.uint64(8), return_index=True, return_counts=True)
        return cls(grams, counts, contexts, np.add.reduceat(counts, first), distinct)

    def interpolate(self, codes: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """Probabilities of the last bytes of `codes`, given those of the next lower order."""
        here, there = find(self.grams, codes), find(self.contexts, codes >> np.uint64(8))
        seen = np.where(here < 0, 0, self.counts[here])
        total, distinct = self.totals[there], self.distinct[there]
        return np.where(there < 0, lower, (seen + distinct * lower) / (total + distinct))


def find(ordered: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted number is, or -1."""
    at = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return np.where(ordered[at] == wanted, at, -1)


@dataclass(frozen=True)
class NGram:
    """Tables of the orders 1, 2, ... in this order."""

    tables: tuple[Table, ...]

    @classmethod
    def train(cls, texts: Iterable[bytes], order: int = 5) -> NGram:
        texts = list(texts)
        return cls(
            tuple(
                Table.count(np.concatenate([windows(text, n) for text in texts])) for n in range(1, order + 1)
            )
        )

    def probabilities(self, text: bytes) -> np.ndarray:
        """Of each byte of the text, float64."""
        p = np.full(len(text), 1 / 256)
        for n, table in enumerate(self.tables, start=1):
            p = table.interpolate(windows(text, n), p)
        return p

    def bits(self, text: bytes) -> float:
        return float(-np.log2(self.probabilities(text)).sum())
