"""Models for passes over caches, compiled, planned and looked at."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from torch.fx import GraphModule

import effopt
from effopt.graph.rewrite import PassResult
from effopt.passes.base import Context, GraphPass, Stage
from tests.models import architectures
from tests.models.plain import Plain
from tests.test_caches import model_of, prompt

NAME = "share-kv-across-layers"


@dataclass(frozen=True)
class Look(GraphPass):
    """Hands each graph to `seen` at the end of the pipeline."""

    name: ClassVar[str] = "look"
    stage: ClassVar[Stage] = Stage.FINISH
    seen: list[GraphModule] = field(default_factory=list)

    def apply(self, module: GraphModule, context: Context) -> PassResult:
        module.graph.eliminate_dead_code()
        self.seen.append(copy.copy(module))
        return PassResult()

    def count(self, target: str) -> list[int]:
        """Calls of an op whose name holds `target`, in each graph."""
        return [sum(target in str(n.target) for n in m.graph.nodes) for m in self.seen]


def compiled(function: Any, look: Look | None = None, **options: Any) -> Callable[..., Any]:
    passes = [options.pop("passes", ""), *([look] if look else [])]
    chosen = {"lowering": "eager", **options, "passes": [p for p in passes if p]}
    return torch.compile(function, backend="effopt", options=chosen)


def model_and_inputs(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Four layers without a cache, in float64 where the model allows."""
    torch.manual_seed(1)
    if name == "plain":
        return Plain(4).double(), {"input_ids": torch.randint(3, 100, (2, 9))}
    if name == "vit":
        config: Any = transformers.ViTConfig(
            hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=112, image_size=16,
            patch_size=8,
        )  # fmt: skip
        return transformers.ViTModel(config).double().eval(), {
            "pixel_values": torch.randn(2, 3, 16, 16).double()
        }
    ids, mask = prompt()
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name == "bert":
        return architectures.build(name, num_hidden_layers=4)[0].double(), inputs
    model = model_of(name)
    model.config.use_cache = False
    if name == "t5":
        model.decoder.config.use_cache = False
        inputs |= {"decoder_input_ids": ids[:, 4:]}
    return (model if name == "mixtral" else model.double()), inputs


def output_of(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else architectures.main_output(result)


def planned(model: Any, spec: str = NAME) -> effopt.Plan:
    ids, mask = prompt()
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids
    return effopt.calibrate(model, [batch], spec)
