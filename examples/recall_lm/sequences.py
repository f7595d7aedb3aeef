"""What the recall model reads: facts anywhere in filler, and questions after them that ask for each.

    begin f f f [7 is 3] f f f f f [2 is 9] f f 7? 3 f f f 2? 9 f f f 7? 3 f

A fact is one token, a key and its value; a question is the token of a key, and its answer that of the value
which the fact of this key gave. Nothing else says it. The filler goes on where something interrupts it: of
each two symbols in a row four others may follow, with fixed chances. So filler asks for what is near, a
question asks for what may be anywhere. Everything is a function of its arguments.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from effopt.testing import quality

FILLER, KEYS, VALUES = 32, 16, 16
KEY = FILLER
VALUE = KEY + KEYS
FACT = VALUE + VALUES
BEGIN = FACT + KEYS * VALUES
"""Filler, keys, values and facts begin at 0, KEY, VALUE and FACT; a sequence begins with BEGIN."""
VOCAB = BEGIN + 8
CHANCES = (0.7, 0.2, 0.07, 0.03)
"""Of the four symbols that may follow two others."""
LENGTH = 512
DISTANCES = (24, 64, 128, 256, 480)
"""Of probes: tokens from a fact to the answer of its question, both included."""


@cache
def following() -> np.ndarray:
    """The four symbols that may follow each two, int64 `[FILLER, FILLER, 4]`."""
    rng = np.random.default_rng(7)
    return np.stack([rng.permutation(FILLER)[:4] for _ in range(FILLER**2)]).reshape(FILLER, FILLER, 4)


def filler(count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` symbols in a row, int64."""
    table, choices = following(), rng.choice(4, size=count, p=CHANCES)
    a, b = rng.integers(FILLER, size=2)
    found = np.empty(count, dtype=np.int64)
    for i, choice in enumerate(choices):
        a, b = b, table[a, b, choice]
        found[i] = b
    return found


def sequence(
    length: int, facts: int, questions: int, rng: np.random.Generator, but: int = -1
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, weights of all but the first): facts and questions at random places, no question too early.

    A weight is 0 where nobody could know the token: at facts and at keys. `but` is a key that does not occur.
    """
    places = facts + questions
    units = length - 1 - questions  # a question and its answer are one
    is_place = np.zeros(units, dtype=bool)
    is_place[rng.permutation(units)[:places]] = True
    names = rng.permutation(np.flatnonzero(np.arange(KEYS) != but))[:facts]
    values = rng.integers(VALUES, size=facts)
    # Which fact a place speaks of: each once at least. The first place of a fact states it.
    order = rng.permutation(np.concatenate([np.arange(facts), rng.integers(facts, size=questions)]))
    is_question = np.ones(places, dtype=bool)
    is_question[np.unique(order, return_index=True)[1]] = False
    starts = np.flatnonzero(is_place) + 1 + np.cumsum(is_question) - is_question
    key, value = names[order], values[order]
    tokens, weights = np.full(length, BEGIN), np.ones(length, dtype=np.float32)
    tokens[starts] = np.where(is_question, KEY + key, FACT + key * VALUES + value)
    tokens[starts[is_question] + 1] = VALUE + value[is_question]
    weights[starts] = 0
    is_filler = weights > 0
    is_filler[[0, *(starts[is_question] + 1)]] = False
    tokens[is_filler] = filler(int(is_filler.sum()), rng)
    return tokens, weights[1:]


def counts_in(length: int) -> tuple[int, int]:
    """How many facts and questions a sequence has: half of a short one, a fifth of a long one."""
    return min(KEYS, length // 8), min(2 * KEYS, length // 5)


def batch(seed: int, step: int, size: int, length: int, answer_weight: float) -> tuple[torch.Tensor, ...]:
    """One step's (tokens, int64 [size, length + 1]; weights of all but the first, float32 [size, length])."""
    rng = np.random.default_rng([seed, step])
    rows = [sequence(length + 1, *counts_in(length), rng) for _ in range(size)]
    tokens, weights = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
    is_answer = (tokens[:, 1:] >= VALUE) & (tokens[:, 1:] < FACT)
    return tokens, torch.where(is_answer, answer_weight, weights)


def texts(count: int, length: int = LENGTH, seed: int = 1000) -> list[quality.Text]:
    """Sequences that training never saw."""
    rng = np.random.default_rng([seed, length])
    rows = [sequence(length + 1, *counts_in(length), rng)[0] for _ in range(count)]
    return [quality.Text(f"sequence {i}", torch.from_numpy(row)) for i, row in enumerate(rows)]


def probes(count: int, distances: tuple[int, ...] = DISTANCES, length: int = LENGTH) -> list[quality.Probe]:
    """`count` a distance: a question at the end, of a fact that was stated before and not asked for since."""
    return [probe(distance, length, i) for distance in distances for i in range(count)]


def probe(distance: int, length: int, index: int) -> quality.Probe:
    """The index-th probe of a distance."""
    rng = np.random.default_rng([1, distance, index])
    key, value, at = int(rng.integers(KEYS)), int(rng.integers(VALUES)), length - distance
    facts, questions = counts_in(length)
    while True:
        row, _ = sequence(length - 3, facts - 1, questions, rng, but=key)
        if not KEY <= row[at - 1] < VALUE:  # else the fact would stand between a question and its answer
            break
    fact, end = [FACT + key * VALUES + value], [KEY + key, VALUE + value]
    tokens = torch.from_numpy(np.concatenate([row[:at], fact, row[at:], end]))
    return quality.Probe(tokens, (length - 1, length), distance)
