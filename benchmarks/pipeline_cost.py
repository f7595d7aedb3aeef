"""What the default pipeline costs on synthetic graphs: seconds a stage, milliseconds a match, and growth.

    python benchmarks/pipeline_cost.py [--nodes 1000 3000 10000] [--repeats 3]

The graph is a stack of decoder layers with nothing recognised yet: 2 RMS norms, 7 linear layers, 2 rotary
embeddings, attention spelled out, a gated unit, 2 residual additions; 66 nodes a layer before the passes.
Every layer holds 9 places that the pipeline rewrites, and 3 look-alikes that it must refuse.
Each rewrite is taken without a numeric check; `--check` adds those of the default options.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from effopt import pipeline as pipelines
from effopt.graph.weights import DerivedWeights
from effopt.passes.base import Context, Stage
from effopt.plugins.manager import build_registry
from effopt.target import target_of

WIDTH, HEADS, TOKENS = 64, 4, 12


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos + torch.cat((-b, a), -1) * sin


def layer(x: torch.Tensor, norm: torch.Tensor, square: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    h = rms_norm(x, norm)
    q, k, v = (F.linear(h, square).view(1, TOKENS, HEADS, -1).transpose(1, 2) for _ in range(3))
    q, k = rotate(q, table, table + 1), rotate(k, table, table + 1)
    scores = q @ k.transpose(2, 3) * 0.25
    mixed = (torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(1, TOKENS, WIDTH)
    x = x + F.linear(mixed, square)
    h = rms_norm(x, norm)
    x = x + F.linear(F.silu(F.linear(h, square)) * F.linear(h, square), square)
    # Look-alikes: a norm of another dimension, a gate that is broadcast, a step that is no GELU.
    x = x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)
    x = x * F.silu(x[..., :1])
    return x * (1 + torch.erf(x / 1.5))


def synthetic(nodes: int) -> tuple[GraphModule, list[torch.Tensor]]:
    """A graph in normal form of at least `nodes` nodes: one traced layer, written again and again."""
    inputs = [
        torch.randn(1, TOKENS, WIDTH),
        torch.rand(WIDTH),
        torch.randn(WIDTH, WIDTH) / 8,
        torch.randn(TOKENS, WIDTH // HEADS),
    ]
    traced = make_fx(layer, tracing_mode="fake", pre_dispatch=True)(*inputs)
    graph = torch.fx.Graph()
    module = GraphModule(torch.nn.Module(), graph)
    heads = [graph.node_copy(p) for p in traced.graph.find_nodes(op="placeholder")]
    x: Any = heads[0]
    while len(graph.nodes) < nodes:
        known = dict(zip(traced.graph.find_nodes(op="placeholder"), [x, *heads[1:]], strict=True))
        x = graph.graph_copy(traced.graph, known)
    graph.output((x,))
    return module, inputs


def run(nodes: int, check: bool) -> tuple[int, int, Counter[str]]:
    """Nodes before, matches, and seconds by stage of one run of the default pipeline."""
    registry = build_registry()
    passes = pipelines.build(registry)
    module, inputs = synthetic(nodes)
    count = len(module.graph.nodes)

    def approve(pass_: Any, match: Any, replacement: Any) -> str | None:
        return (
            registry.hook.effopt_approve_rewrite(pass_=pass_, match=match, replacement=replacement)
            if check
            else None
        )

    context = Context(target_of(torch.device("cpu")), False, approve, DerivedWeights(inputs))
    seconds: Counter[str] = Counter()
    matches = 0
    for pass_ in passes:
        start = time.perf_counter()
        result = pass_.apply(module, context)
        seconds[f"{Stage(pass_.stage).name}/{pass_.name}"] += time.perf_counter() - start
        matches += len(result.applied)
    return count, matches, seconds


def best(
    function: Callable[[], tuple[int, int, Counter[str]]], repeats: int
) -> tuple[int, int, Counter[str]]:
    """The quickest of several runs: what the machine can do when nobody disturbs it."""
    return min((function() for _ in range(repeats)), key=lambda found: sum(found[2].values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--nodes", type=int, nargs="+", default=[1000, 3000, 10000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="with the numeric checks of the default options")
    arguments = parser.parse_args()
    rows = [best(lambda n=n: run(n, arguments.check), arguments.repeats) for n in arguments.nodes]
    for count, matches, seconds in rows:
        total = sum(seconds.values())
        print(f"{count} nodes, {matches} matches: {total:.3f} s, {1e3 * total / matches:.3f} ms a match")
        print(f"  {1e6 * total / count:.1f} us a node")
        for name, spent in seconds.most_common():
            print(f"  {spent:8.4f} s  {name}")
    (few, _, first), (many, _, last) = rows[0], rows[-1]
    growth = sum(last.values()) / sum(first.values())
    print(f"{many / few:.1f} times the nodes take {growth:.1f} times as long")


if __name__ == "__main__":
    main()
