"""The picture: KL divergence against each cost, intervals as error bars, the Pareto front as a line.

The one module that needs matplotlib, which is optional: it is imported on first use.
"""

from __future__ import annotations

import importlib.util
import io
import math
import statistics
from collections.abc import Sequence
from typing import Any

from effopt.errors import EffoptError
from effopt.tradeoff.result import AXES, Axis, Row, Tradeoff

_DPI = 150
_REFUSED = "#777777"
_MARKERS = "os^Dv<>Ph*X"


def require_matplotlib() -> None:
    """Raise EffoptError, with the remedy, where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        raise EffoptError("a picture needs matplotlib: pip install 'effopt[plot]'")


def as_png(result: Tradeoff) -> bytes:
    """One panel a cost. Raises EffoptError without matplotlib."""
    require_matplotlib()
    # The object interface draws without pyplot's global state and without a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [row for row in result.rows if row.kl is not None]
    figure = Figure(figsize=(11, 8 + 0.14 * len(shown)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    linear_below = _smallest(shown) / 2
    for axis, panel in zip(AXES, panels.flat, strict=True):
        _draw(panel, result, axis, shown, linear_below)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    figure.suptitle("Quality against cost: lower left is better; the line is the Pareto front")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _smallest(rows: Sequence[Row]) -> float:
    """The scale is linear around 0 up to half of the smallest divergence that is one."""
    found = [row.kl for row in rows if row.kl is not None and row.kl > 1e-7]
    return min(found, default=1e-3)


def _draw(panel: Any, result: Tradeoff, axis: Axis, shown: Sequence[Row], linear_below: float) -> None:
    panel.set_yscale("symlog", linthresh=linear_below)
    scale, unit = _scale([axis.of(row) for row in shown], axis.unit)
    panel.set_xlabel(f"{axis.title}, {unit}")
    panel.set_ylabel("KL from uncompressed, nats a token")
    panel.grid(visible=True, alpha=0.3)
    for index, row in enumerate(shown):
        cost = axis.of(row)
        assert row.quality is not None, "a row is shown for its quality"
        assert row.quality.kl is not None, "and for its divergence"
        kl = row.quality.kl
        name = f"{row.way.name} (refused)" if row.is_refused else row.way.name
        panel.errorbar(
            math.nan if cost is None else cost / scale,
            kl.value,
            yerr=[[max(0.0, kl.value - kl.low)], [max(0.0, kl.high - kl.value)]],
            xerr=_spread(row, axis, scale),
            fmt=_MARKERS[index % len(_MARKERS)],
            color=_REFUSED if row.is_refused else f"C{index % 10}",
            capsize=3,
            markersize=8,
            label=name,
        )
    on_front = [row for row, is_on in zip(result.rows, result.front(axis), strict=True) if is_on]
    points = sorted((cost / scale, row.kl) for row in on_front if (cost := axis.of(row)) is not None)
    steps = {"drawstyle": "steps-post", "linewidth": 1, "alpha": 0.6, "zorder": 0}
    panel.plot([x for x, _ in points], [y for _, y in points], "k--", **steps)
    if all(axis.of(row) is None for row in shown):
        panel.text(0.5, 0.5, "not measured", transform=panel.transAxes, ha="center")
    panel.set_xlim(0, 1.05 * panel.get_xlim()[1])
    panel.set_ylim(bottom=-linear_below / 2)


def _spread(row: Row, axis: Axis, scale: float) -> Any:
    """Quartiles over rounds, of what is measured in rounds."""
    if axis.name != "seconds_a_token" or len(row.decode_s) < 3:
        return None
    low, median, high = statistics.quantiles(row.decode_s, n=4, method="inclusive")
    return [[(median - low) / scale], [(high - median) / scale]]


def _scale(values: Sequence[float | None], unit: str) -> tuple[float, str]:
    """What to divide by, and the unit with its prefix."""
    largest = max((value for value in values if value), default=1.0)
    steps = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"))
    size, prefix = next(((s, p) for s, p in steps if largest >= s), steps[-1])
    return size, f"{prefix}{unit}"
