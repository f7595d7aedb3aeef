"""Train the tiny language model: `python examples/tiny_lm/train.py --help`. README.md has the command used.

A plan is a list of stages, `LENGTHxSIZE:STEPS` (tokens a sequence, sequences a step, steps). `:answers=4`
lets the answers of recall pairs count four times in the loss; the last stage may end in `:decay`:
`256x16:2000,1024x4:600:answers=4,1024x4:200:answers=4:decay`. The rate is constant until the decay, so
training can be stopped at any time (Ctrl-C or SIGTERM saves), and go on with a plan that has more steps, or
decays from there.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import attention
import data
import evaluate
import model as tiny
import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn import functional as F


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


@dataclass
class Run:
    """All that changes while training: what a resumed run must have again."""

    model: Any
    optimizers: list[torch.optim.Optimizer]
    step: int
    losses: list[list[float]]
    """One row a step: tokens read before it, loss in bits per token, seconds."""
    checks: list[dict[str, float]]
    """Held-out bits per byte and recall, measured now and then."""

    @classmethod
    def start(cls, of: Any, seed: int, attention: str, rate: float) -> Run:
        torch.manual_seed(seed)
        model = tiny.build(of, attention).train()
        return cls(model, optimizers(model, rate), 0, [], [])

    def save(self, path: Path, plan: Plan) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "step": self.step,
            "losses": self.losses,
            "checks": self.checks,
            "done": plan.done(self.step),
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def resume(self, path: Path, plan: Plan) -> None:
        state = torch.load(path, weights_only=True)
        if (planned := plan.done(state["step"])) != state["done"]:
            raise typer.BadParameter(
                f"{path} was trained for {state['step']} steps as {state['done']}, "
                f"but the plan has {planned} there"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.losses, self.checks = state["step"], state["losses"], state["checks"]


def optimizers(model: Any, rate: float) -> list[torch.optim.Optimizer]:
    """Muon (arXiv:2502.16982, its rate matched to AdamW's) for the layers' matrices; AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    tables = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." not in n]
    scales = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": tables, "weight_decay": 0.01}, {"params": scales, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95)),
    ]


def loss_of(model: Any, tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean cross-entropy in nats. Matrix products in bfloat16, all else and weights in float32."""
    positions = torch.arange(weights.shape[1], device=tokens.device)[None]
    with torch.autocast(tokens.device.type, torch.bfloat16):
        logits = model(input_ids=tokens[:, :-1], position_ids=positions, use_cache=False).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def train_step(run: Run, loss_fn: Any, plan: Plan, seed: int, rate: float, recall_share: float) -> float:
    """One step; returns its loss in bits per token."""
    stage, _ = plan.at(run.step)
    first = plan.tokens_before(run.step) // stage.length
    shape = stage.size, stage.length, first
    loss = loss_fn(run.model, *data.batch(seed, run.step, *shape, recall_share, stage.answer_weight))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0, error_if_nonfinite=True)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * plan.rate(run.step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    run.step += 1
    return loss.item() / math.log(2)


def draw(run: Run, path: Path) -> None:
    """The loss curve, and the recall that grew with it. Needs matplotlib."""
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True)
    read = [row[0] / 1e6 for row in run.losses]
    smooth, now = [], run.losses[0][1]
    for row in run.losses:
        now += 0.03 * (row[1] - now)
        smooth.append(now)
    top.plot(read, smooth, label="training, bits per token (running mean)")
    at = [check["tokens"] / 1e6 for check in run.checks]
    top.plot(at, [check["bits_per_byte"] for check in run.checks], "o-", label="held out, bits per byte")
    top.set(ylim=(0, 5), ylabel="bits")
    top.legend()
    for distance in evaluate.DISTANCES:
        bottom.plot(
            at, [check[f"recall@{distance}"] for check in run.checks], "o-", label=f"{distance} tokens"
        )
    bottom.set(ylim=(-0.02, 1.02), xlabel="million tokens read", ylabel="recall: whole value right")
    bottom.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def described(run: Run, plan: Plan, seed: int, rate: float, recall_share: float) -> dict[str, Any]:
    """What was trained, and the command that does it again in one go."""
    return {
        "command": f"python examples/tiny_lm/train.py --folder RUN --plan {plan.done(run.step)} "
        f"--rate {rate} --recall-share {recall_share} --seed {seed}",
        "is_decay_complete": plan.stages[-1].is_decay and run.step == plan.steps,
        "steps": run.step,
        "tokens": plan.tokens_before(run.step),
        "seconds_in_steps": round(sum(row[2] for row in run.losses)),
        "torch": torch.__version__,
        "checks": run.checks,
    }


def main(
    plan: Annotated[str, typer.Option(help="LENGTHxSIZE:STEPS,... the last may end in :decay")],
    folder: Annotated[Path, typer.Option(help="where the state, the log and the results are kept")],
    resume: Annotated[bool, typer.Option(help="go on from the state in --folder")] = False,
    backend: Annotated[str, typer.Option(help="of torch.compile; eager compiles nothing")] = "inductor",
    attention_: Annotated[
        str, typer.Option("--attention", help="causal-blocks (faster here) or sdpa")
    ] = attention.NAME,
    rate: Annotated[float, typer.Option(help="learning rate before the decay")] = 3e-3,
    recall_share: Annotated[float, typer.Option(help="sequences with recall pairs, 0 to 1")] = 0.2,
    seed: int = 0,
    threads: int = 1,
    save_every: Annotated[int, typer.Option(help="steps")] = 100,
    check_every: Annotated[int, typer.Option(help="steps")] = 200,
) -> None:
    torch.set_num_threads(threads)
    attention.register()
    folder.mkdir(parents=True, exist_ok=True)
    whole = Plan(tuple(Stage.parse(part) for part in plan.split(",")))
    run, state = Run.start(tiny.config(), seed, attention_, rate), folder / "state.pt"
    if resume:
        run.resume(state, whole)
    elif state.exists():
        raise typer.BadParameter(f"{state} exists: --resume goes on from it, another --folder starts anew")
    loss_fn = loss_of if backend == "eager" else torch.compile(loss_of, backend=backend, dynamic=False)
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    signal.signal(signal.SIGINT, lambda number, _: stopped.append(number))
    (folder / "train.pid").write_text(str(os.getpid()))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress, (folder / "log.jsonl").open("a") as log:
        bar = progress.add_task("training", total=whole.steps, completed=run.step)
        while run.step < whole.steps and not stopped:
            began, read = time.perf_counter(), whole.tokens_before(run.step)
            bits = train_step(run, loss_fn, whole, seed, rate, recall_share)
            run.losses.append([read, bits, time.perf_counter() - began])
            progress.update(bar, completed=run.step, description=f"{bits:.3f} bits per token")
            log.write(json.dumps({"step": run.step, "tokens": read, "bits": round(bits, 4)}) + "\n")
            log.flush()
            last = run.step == whole.steps or bool(stopped)
            if run.step % check_every == 0 or last:
                tokens = whole.tokens_before(run.step)
                run.checks.append({"tokens": tokens, **evaluate.quick_check(run.model)})
                log.write(json.dumps(run.checks[-1]) + "\n")
            if run.step % save_every == 0 or last:
                run.save(state, whole)
    tiny.save(run.model, folder)
    draw(run, folder / "loss.png")
    (folder / "training.json").write_text(
        json.dumps(described(run, whole, seed, rate, recall_share), indent=1)
    )
    print(f"step {run.step} of {whole.steps}; state, weights, log and loss.png are in {folder}")


if __name__ == "__main__":
    typer.run(main)
