"""Numbers with units, short enough for a table."""

from __future__ import annotations

_STEPS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def scaled(value: float, unit: str) -> str:
    """Three digits and a prefix: `4.12 GFLOP`, `812 MB`, `96 B`."""
    for size, prefix in _STEPS:
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def change(before: float, after: float) -> str:
    """`-31 %`, `+2 %`, `same`; empty if there was nothing."""
    if not before:
        return ""
    ratio = 100.0 * (after - before) / before
    return "same" if abs(ratio) < 0.5 else f"{ratio:+.0f} %"


def duration(seconds: float) -> str:
    """`8.2 s`, `41 ms`, `120 us`."""
    if seconds >= 1:
        return f"{seconds:.1f} s" if seconds < 100 else f"{seconds:.0f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"
