"""Train the recall model, measure it, and write its checkpoint: `python examples/recall_lm/train_recall.py`.

Deterministic: the same torch on the same machine gives the same bytes. README.md says what came of it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Annotated, Any

import recall_model
import schedule
import sequences
import torch
import train
import typer
from recall_model import tiny  # puts examples/tiny_lm on the path, for what follows

from effopt.testing import quality

PLAN = (
    "64x32:400:answers=4,128x16:100:answers=4,256x8:100:answers=4,"
    "512x4:150:answers=4,512x4:200:answers=4:decay"
)
TIER = quality.Tier(context=sequences.LENGTH, stride=sequences.LENGTH)


def trained(plan: schedule.Plan, seed: int, rate: float) -> train.Run:
    """A run that is through with its plan. Matrix products in float32: at these sizes the faster ones too."""
    torch.manual_seed(seed)
    model = tiny.build(recall_model.config()).train()
    run = train.Run(model, train.optimizers(model, rate), 0, [], [])
    loss_fn = functools.partial(train.loss_of, is_mixed=False)
    for step in train.shown(plan, run):
        stage, _ = plan.at(step)
        batch = sequences.batch(seed, step, stage.size, stage.length, stage.answer_weight)
        train.descend(run, loss_fn, plan, batch, rate)
    return run


def measured(model: Any) -> dict[str, Any]:
    """Recall by distance, and bits a token of sequences that training never saw."""
    found = quality.evaluate(model, sequences.texts(32), probes=sequences.probes(128), tier=TIER)
    metrics = {name: dataclasses.asdict(interval) for name, interval in found.metrics.items()}
    return {"bits_per_token" if name == "bits_per_byte" else name: value for name, value in metrics.items()}


def main(
    plan: Annotated[str, typer.Option(help="LENGTHxSIZE:STEPS,... of ../tiny_lm/schedule.py")] = PLAN,
    into: Annotated[Path, typer.Option(help="where the checkpoint goes")] = recall_model.CHECKPOINT,
    rate: Annotated[float, typer.Option(help="learning rate before the decay")] = 5e-3,
    seed: int = 0,
) -> None:
    torch.set_num_threads(1)
    whole = schedule.Plan.parse(plan)
    run = trained(whole, seed, rate)
    tiny.save(run.model, into)
    numbers = {
        "sha256": tiny.sha256(into / tiny.WEIGHTS),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "command": f"python examples/recall_lm/train_recall.py --plan {plan} --rate {rate} --seed {seed}",
        "steps": run.step,
        "tokens": whole.tokens_before(run.step),
        "seconds_in_steps": round(sum(row[2] for row in run.losses)),
        "torch": torch.__version__,
        "metrics": measured(tiny.read(into)),
    }
    (into / tiny.NUMBERS).write_text(json.dumps(numbers, indent=1) + "\n")
    (into / tiny.SHA256).write_text(f"{numbers['sha256']}  {tiny.WEIGHTS}\n")
    for name, interval in numbers["metrics"].items():
        print(f"{name:>14}  {interval['value']:.4f} [{interval['low']:.4f}, {interval['high']:.4f}]")


if __name__ == "__main__":
    typer.run(main)
