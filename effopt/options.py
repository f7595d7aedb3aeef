"""The options of one compile call, checked when it starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from effopt.errors import OptionError, unknown

_CHOICES = {"verify": ("off", "first", "always"), "lowering": ("auto", "measured", "reference", "eager")}
_TYPES: dict[str, tuple[type, ...]] = {
    "disable": (str, list, tuple),
    "inductor": (Mapping,),
    "release_weights": (bool,),
    "outline": (bool,),
    "report": (str,),
    "rtol": (float, int),
    "fuel": (int,),
    "dump": (str,),
    "plugins": (list, tuple),
}


@dataclass(frozen=True)
class Options:
    """`options=` of `torch.compile(model, backend="effopt")`."""

    passes: Any = ()
    """Added to the exact pipeline: text, names or instances."""
    pipeline: Any = None
    """Replaces the exact pipeline."""
    disable: Sequence[str] = ()
    plans: Any = ()
    """A plan of `effopt.calibrate` or `effopt.tune`, or several: their passes run, and decide as they say."""
    inductor: Mapping[str, Any] = field(default_factory=dict)
    """Configuration entries handed to Inductor."""
    verify: str = "first"
    """Check the first rewrite of each class, every one (`always`), or none (`off`)."""
    rtol: float | None = None
    """Relative tolerance of the checks, instead of the dtype's."""
    fuel: int | None = None
    """Allow this many rewrites in each graph; for finding a wrong one."""
    dump: str | None = None
    """Directory to write the graph to, before and after each pass that changed it."""
    lowering: str = "auto"
    """`measured` tries kernels that are predicted to be near each other; `reference` inlines every reference;
    `eager` runs the graph without Inductor."""
    release_weights: bool = False
    """Free parameters that a pass replaced and no graph reads. Eager calls of the model then raise."""
    outline: bool = True
    """Compile equal blocks once."""
    report: str | None = None
    """Path (.json or .html) to write the report to after each graph."""
    plugins: Sequence[Any] = ()
    """Plugin objects for this call only."""
    mode: str | None = None

    @staticmethod
    def parse(given: Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """Check names, types and values. Raises OptionError that names the fault and the valid ones."""
        given = dict(given or {})
        names = [f.name for f in dataclasses.fields(Options) if f.name != "mode"]
        for key, value in given.items():
            if key not in names:
                raise unknown("option", key, names)
            if key in _CHOICES and value not in _CHOICES[key]:
                raise unknown(f"value for option {key!r}:", str(value), _CHOICES[key])
            if key in _TYPES and value is not None and not isinstance(value, _TYPES[key]):
                wanted = " or ".join(t.__name__ for t in _TYPES[key])
                raise OptionError(f"option {key!r} must be {wanted}, got {value!r} ({type(value).__name__})")
        wrong = [n for n in given.get("disable") or () if not isinstance(n, str)]
        if wrong:
            raise OptionError(f"option 'disable' must hold names of passes, got {wrong[0]!r}")
        if isinstance(given.get("disable"), str):
            given["disable"] = [n.strip() for n in given["disable"].split(",") if n.strip()]
        if given.get("rtol") is not None and not 0 < given["rtol"] < 1:
            raise OptionError(f"option 'rtol' must lie in (0, 1), got {given['rtol']!r}")
        if given.get("fuel") is not None and (isinstance(given["fuel"], bool) or given["fuel"] < 0):
            raise OptionError(f"option 'fuel' must be a count of rewrites, 0 or more, got {given['fuel']!r}")
        if given.get("report") and not given["report"].endswith((".json", ".html")):
            got = given["report"]
            raise OptionError(f"option 'report' must be a path ending in .json or .html, got {got!r}")
        return Options(**given, mode=mode)
