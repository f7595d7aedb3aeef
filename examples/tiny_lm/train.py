"""Train the tiny language model: `python examples/tiny_lm/train.py --help`. README.md has the command used.

schedule.py says what a plan is. Training can be stopped at any time (Ctrl-C or SIGTERM saves) and go on with
`--resume`, also with a plan that has more steps, or that decays from there.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import attention
import data
import evaluate
import model as tiny
import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from schedule import Plan
from torch.nn import functional as F


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
    def start(cls, of: Any, seed: int, attention: str, rate: float, weights: Path | None = None) -> Run:
        """At step 0; with `weights`, those of a checkpoint, of which the optimizers know nothing yet."""
        torch.manual_seed(seed)
        model = tiny.build(of, attention) if weights is None else tiny.load(weights, attention=attention)
        return cls(model.train(), optimizers(model, rate), 0, [], [])

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


def loss_of(model: Any, tokens: torch.Tensor, weights: torch.Tensor, is_mixed: bool = True) -> torch.Tensor:
    """Weighted mean cross-entropy in nats. `is_mixed`: matrix products in bfloat16, all else in float32."""
    positions = torch.arange(weights.shape[1], device=tokens.device)[None]
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=is_mixed):
        logits = model(input_ids=tokens[:, :-1], position_ids=positions, use_cache=False).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / weights.sum()


def train_step(
    run: Run, loss_fn: Any, plan: Plan, seed: int, rate: float, recall_share: float
) -> dict[str, float]:
    """One step on the corpus; returns what it adds to the log."""
    stage, _ = plan.at(run.step)
    shape = stage.size, stage.length, plan.tokens_before(run.step) // stage.length
    batch = data.batch(seed, run.step, *shape, recall_share, stage.answer_weight)
    return descend(run, loss_fn, plan, batch, rate)


def descend(
    run: Run, loss_fn: Any, plan: Plan, batch: Sequence[torch.Tensor], rate: float
) -> dict[str, float]:
    """One step on a batch; returns what it adds to the log: tokens read before it, loss in bits per token,
    seconds.
    """
    began, read = time.perf_counter(), plan.tokens_before(run.step)
    loss = loss_fn(run.model, *batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0, error_if_nonfinite=True)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * plan.rate(run.step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    run.step += 1
    row = {"tokens": read, "bits": loss.item() / math.log(2), "seconds": time.perf_counter() - began}
    run.losses.append([*row.values()])
    return row


def shown(plan: Plan, run: Run) -> Iterator[int]:
    """The steps that are left, with a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        bar = progress.add_task("training", total=plan.steps, completed=run.step)
        while run.step < plan.steps:
            yield run.step
            progress.update(bar, completed=run.step, description=f"{run.losses[-1][1]:.3f} bits per token")


def note(folder: Path, row: dict[str, float]) -> None:
    """One line of the log."""
    with (folder / "log.jsonl").open("a") as log:
        log.write(json.dumps(row) + "\n")


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


def described(
    run: Run, plan: Plan, seed: int, rate: float, recall_share: float, weights: Path | None
) -> dict[str, Any]:
    """What was trained, and the command that does it again in one go."""
    return {
        "command": f"python examples/tiny_lm/train.py --folder RUN --plan {plan.done(run.step)} "
        f"--rate {rate} --recall-share {recall_share} --seed {seed}"
        + (f" --weights {weights}" if weights is not None else ""),
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
    weights: Annotated[
        Path | None, typer.Option(help="begin with the weights of a checkpoint; take another --seed")
    ] = None,
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
    whole = Plan.parse(plan)
    run, state = Run.start(tiny.config(), seed, attention_, rate, weights), folder / "state.pt"
    if resume:
        run.resume(state, whole)
    elif state.exists():
        raise typer.BadParameter(f"{state} exists: --resume goes on from it, another --folder starts anew")
    loss_fn = loss_of if backend == "eager" else torch.compile(loss_of, backend=backend, dynamic=False)
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _: stopped.append(got))
    (folder / "train.pid").write_text(str(os.getpid()))
    for step in shown(whole, run):
        if stopped:
            break
        row = train_step(run, loss_fn, whole, seed, rate, recall_share)
        note(folder, {"step": step, **row})
        if run.step % check_every == 0 or run.step == whole.steps:
            run.checks.append({"tokens": whole.tokens_before(run.step), **evaluate.quick_check(run.model)})
            note(folder, run.checks[-1])
        if run.step % save_every == 0:
            run.save(state, whole)
    run.save(state, whole)
    tiny.save(run.model, folder)
    told = json.dumps(described(run, whole, seed, rate, recall_share, weights), indent=1)
    (folder / "training.json").write_text(told)
    print(f"step {run.step} of {whole.steps}; state, weights and log are in {folder}")
    if find_spec("matplotlib") is None:
        print("no loss.png: it needs matplotlib; --resume draws it once that is installed")
    else:
        draw(run, folder / "loss.png")


if __name__ == "__main__":
    typer.run(main)
