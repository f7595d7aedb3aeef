"""Capture over many `transformers` architectures: one row a model, mode and pipeline.

    python benchmarks/sweep.py [--names llama,gpt2] [--modes inference,training,dynamic]
                               [--pipelines none,default] [--lowering eager|auto] [--layers 2]

Each row tells the graphs that Dynamo gave (with effopt and with the backend `eager`, which must be
equal), those that were refused and why, nodes, attention ops recognised, seconds of capture, and the
relative error of outputs and of parameter gradients against the model run as it is.
"""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from effopt.compile import effopt, record
from effopt.plugins.report import Report
from tests.models.architectures import ARCHITECTURES, MORE, build, main_output

PIPELINES: dict[str, dict[str, Any]] = {"none": {"pipeline": ""}, "default": {}}


@dataclass
class Row:
    """What one model did in one mode."""

    name: str
    mode: str
    pipeline: str
    output_error: float = float("nan")
    gradient_error: float = float("nan")
    plain_graphs: int = 0
    report: Report = field(default_factory=Report)
    failure: str = ""

    @property
    def is_good(self) -> bool:
        """One graph for each of Dynamo's, none refused, equal results."""
        equal = self.output_error <= 2e-5 and not self.gradient_error > 1e-3
        return (
            equal and not self.failure and len(self.report.graphs) == self.plain_graphs and not self.refused
        )

    @property
    def refused(self) -> list[str]:
        """Reasons of graphs left as they are."""
        return [g.refused for g in self.report.graphs if g.refused]

    def __str__(self) -> str:
        graphs = self.report.graphs
        seconds = sum(g.seconds.get("capture", 0.0) for g in graphs)
        nodes = sum(g.nodes_before for g in graphs)
        text = (
            f"{'ok  ' if self.is_good else 'FAIL'} {self.name:14} {self.mode:9} {self.pipeline:8} "
            f"graphs {len(graphs)}/{self.plain_graphs} nodes {nodes:5} "
            f"attention {self.report.ops['attention']} "
            f"capture {seconds:5.2f}s {1e3 * seconds / max(nodes, 1):4.1f} ms/node "
            f"error {self.output_error:.1e} grad {self.gradient_error:.1e}"
        )
        return "\n     ".join([text, *self.refused, *([self.failure] if self.failure else [])])


def relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    """Gradients of the parameters that have one, flat."""
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def run(model: torch.nn.Module, call: Callable[..., Any], batches: list[Any], mode: str) -> Any:
    """Outputs for each batch, and gradients of the sum of their squares in training."""
    model.zero_grad()
    if mode != "training":
        with torch.no_grad():
            return [main_output(call(**batch)) for batch in batches], []
    outputs = [main_output(call(**batch)) for batch in batches]
    sum(o.square().sum() for o in outputs).backward()
    return [o.detach() for o in outputs], gradients(model)


def batches_of(name: str, inputs: dict[str, Any], mode: str) -> list[Any]:
    """One batch, or three lengths of it when sizes are dynamic."""
    if mode != "dynamic":
        return [inputs]
    return [{k: v[:, :n] for k, v in inputs.items()} for n in (12, 10, 7)]


def depth(name: str, layers: int) -> dict[str, int]:
    """Configuration entries for this many layers, by the name that the architecture has for them."""
    config = (ARCHITECTURES.get(name) or MORE[name]).config
    own = [entry for entry in ("n_layer", "num_layers") if entry in config]
    return dict.fromkeys(own or ["num_hidden_layers"], layers)


def measure(name: str, attn: str, mode: str, pipeline: str, lowering: str, layers: int) -> Row:
    """Run one model as it is and compiled."""
    row = Row(name, mode, pipeline)
    try:
        torch._dynamo.reset()
        model, inputs = build(name, attn, **depth(name, layers))
        model.train(mode == "training")
        batches = batches_of(name, inputs, mode)
        expected, expected_gradients = run(model, model, batches, mode)
        seen: list[int] = []

        def counting(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            seen.append(1)
            return module.forward

        dynamic = True if mode == "dynamic" else None
        run(model, torch.compile(model, backend=counting, dynamic=dynamic), batches, mode)
        row.plain_graphs = len(seen)
        torch._dynamo.reset()
        options = {"lowering": lowering, **PIPELINES[pipeline]}
        with record() as row.report:
            compiled = torch.compile(model, backend=effopt, dynamic=dynamic, options=options)
            got, got_gradients = run(model, compiled, batches, mode)
        row.output_error = max(map(relative, got, expected))
        if mode == "training":
            assert len(got_gradients) == len(expected_gradients), "some parameters got no gradient"
            row.gradient_error = max(map(relative, got_gradients, expected_gradients))
    except Exception as error:  # noqa: BLE001 - a row of the table
        frame = traceback.extract_tb(error.__traceback__)[-1]
        row.failure = f"{type(error).__name__}: {str(error)[:400]} ({frame.filename}:{frame.lineno})"
    return row


def rows(arguments: argparse.Namespace) -> Iterator[Row]:
    """Every row asked for."""
    for name in arguments.names or [*ARCHITECTURES, *MORE]:
        for mode in arguments.modes:
            for pipeline in arguments.pipelines:
                yield measure(name, arguments.attn, mode, pipeline, arguments.lowering, arguments.layers)


def main() -> None:
    words = lambda text: [w for w in text.split(",") if w]  # noqa: E731
    parser = argparse.ArgumentParser()
    parser.add_argument("--names", type=words, default=[])
    parser.add_argument("--modes", type=words, default=["inference", "training", "dynamic"])
    parser.add_argument("--pipelines", type=words, default=["none", "default"])
    parser.add_argument("--attn", default="sdpa")
    parser.add_argument("--lowering", default="eager")
    parser.add_argument("--layers", type=int, default=2)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    bad = 0
    for row in rows(arguments):
        bad += not row.is_good
        print(row, flush=True)
    print(f"{bad} rows not good")


if __name__ == "__main__":
    main()
