"""A plan of training: which batch shape each step has, and which rate.

As text it is a list of stages, `LENGTHxSIZE:STEPS` (tokens a sequence, sequences a step, steps).
`:answers=4` lets the answers of recall pairs count four times in the loss; the last stage may end in
`:decay`:
`256x16:2000,1024x4:600:answers=4,1024x4:200:answers=4:decay`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import ClassVar

import typer


@dataclass(frozen=True)
class Stage:
    """Steps of one batch shape."""

    length: int
    size: int
    steps: int
    answer_weight: float = 1.0
    is_decay: bool = False

    FORM: ClassVar = re.compile(
        r"(?P<length>\d+)x(?P<size>\d+):(?P<steps>\d+)(:answers=(?P<answers>[\d.]+))?(?P<decay>:decay)?"
    )

    @classmethod
    def parse(cls, text: str) -> Stage:
        found = cls.FORM.fullmatch(text)
        if found is None:
            raise typer.BadParameter(f"{text!r}: expected LENGTHxSIZE:STEPS[:answers=WEIGHT][:decay]")
        length, size, steps = (int(found[name]) for name in ("length", "size", "steps"))
        return cls(length, size, steps, float(found["answers"] or 1), found["decay"] is not None)

    def __str__(self) -> str:
        answers = "" if self.answer_weight == 1 else f":answers={self.answer_weight:g}"
        return f"{self.length}x{self.size}:{self.steps}{answers}{':decay' * self.is_decay}"


@dataclass(frozen=True)
class Plan:
    """What each step reads, and at which rate."""

    stages: tuple[Stage, ...]
    warmup: int = 100

    @classmethod
    def parse(cls, text: str) -> Plan:
        return cls(tuple(Stage.parse(part) for part in text.split(",")))

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def at(self, step: int) -> tuple[Stage, int]:
        """The stage of a step, and how many of its steps came before."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, step
            step -= stage.steps
        raise IndexError("the plan has no such step")

    def tokens_before(self, step: int) -> int:
        total = 0
        for stage in self.stages:
            done = min(step, stage.steps)
            total, step = total + done * stage.length * stage.size, step - done
        return total

    def rate(self, step: int) -> float:
        """Warmup, constant, then one minus the square root of the decay's progress (arXiv:2405.18392)."""
        stage, done = self.at(step)
        decay = 1 - math.sqrt(done / stage.steps) if stage.is_decay else 1.0
        return decay * min(1.0, (step + 1) / self.warmup)

    def done(self, steps: int) -> str:
        """The plan of the first `steps` steps. A decay that goes on keeps its length: it set the rate."""
        found = []
        for stage in self.stages:
            count = min(steps, stage.steps)
            if count:
                found.append(str(stage if stage.is_decay else replace(stage, steps=count)))
            steps -= count
        return ",".join(found)
