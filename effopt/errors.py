"""Every error that effopt raises. Each message says what is wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EffoptError(Exception):
    """Base of all errors raised by effopt."""


class OptionError(EffoptError, ValueError):
    """An option, a pass name or a pipeline text that is not valid."""


class PipelineError(EffoptError):
    """Passes that cannot be put in an order: a cycle, a conflict, or a missing requirement."""


class PlanError(EffoptError, ValueError):
    """A plan that does not fit the model, or that one of its graphs cannot carry out."""


class PluginError(EffoptError):
    """A plugin that failed. Names the plugin and the hook; other plugins go on."""


class InvalidGraphError(EffoptError):
    """A pass left a graph that is not in normal form."""


class CaptureRefused(EffoptError):
    """A graph that effopt leaves as it is. The message is the reason; the model still runs."""


class ReleasedWeightError(EffoptError, RuntimeError):
    """Something reads a parameter whose memory option `release_weights` freed."""


class CheckFailed(EffoptError):
    """A rewrite, or a lowering, whose result is not the result of what it replaces."""


class QualityError(EffoptError, ValueError):
    """Texts that a model cannot be judged by, or a figure that is not a finite number."""


class UnexpectedOps(EffoptError, AssertionError):
    """A model that compiled to other canonical ops than its manifest says. Lists them and the near-misses."""


def unknown(kind: str, got: str, valid: Iterable[str]) -> OptionError:
    """An `OptionError` that names the unknown word, the nearest valid one, and all valid ones."""
    known = sorted(valid)
    near = difflib.get_close_matches(got, known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return OptionError(f"unknown {kind} {got!r}.{hint} Valid: {', '.join(known)}")
