"""A decoder written by hand: tensors in one flat module, no submodules, no names that say what a layer is."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.eager_twin import evenly_spaced, rounded

WIDTH, HEADS, INNER, VOCABULARY = 64, 4, 112, 100
MATRICES = {"q": (64, 64), "k": (32, 64), "v": (32, 64), "o": (64, 64), "up": (112, 64), "down": (64, 112)}


class Plain(nn.Module):
    """Grouped-query attention and an MLP in each of `count` layers, pre-norm."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) / shape[-1] ** 0.5)

        self.table = nn.Parameter(torch.randn(VOCABULARY, WIDTH, generator=generator))
        self.head = weight(VOCABULARY, WIDTH)
        for i in range(count):
            for name, shape in MATRICES.items():
                self.register_parameter(f"{name}_{i}", weight(*shape))
            for name in ("before", "between"):
                self.register_parameter(f"{name}_{i}", nn.Parameter(1 + 0.1 * weight(WIDTH).detach()))
        self.order = list(range(count))
        """Which layers run, in order."""
        self.group = 1
        """How many adjacent ones read the same keys and values."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table[input_ids]
        b, t, _ = x.shape
        visible = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        key = value = x
        for position, i in enumerate(self.order):
            p = {name: getattr(self, f"{name}_{i}") for name in (*MATRICES, "before", "between")}
            h = F.rms_norm(x, (WIDTH,), p["before"], 1e-6)
            query = F.linear(h, p["q"]).view(b, t, HEADS, -1).transpose(1, 2)
            if position % self.group == 0:
                key = F.linear(h, p["k"]).view(b, t, 2, -1).transpose(1, 2).repeat_interleave(2, 1)
                value = F.linear(h, p["v"]).view(b, t, 2, -1).transpose(1, 2).repeat_interleave(2, 1)
            scores = query @ key.transpose(-1, -2) * 0.25
            scores = scores.masked_fill(~visible, float("-inf"))
            mixed = scores.softmax(-1) @ value
            x = x + F.linear(mixed.transpose(1, 2).reshape(b, t, WIDTH), p["o"])
            h = F.rms_norm(x, (WIDTH,), p["between"], 1e-6)
            x = x + F.linear(F.gelu(F.linear(h, p["up"])), p["down"])
        return F.linear(x, self.head)

    def skip(self, keep: float) -> None:
        """The twin of skipping layers."""
        self.order = [self.order[i] for i in evenly_spaced(len(self.order), keep)]

    def quantize(self, bits: int, group: int, symmetric: bool) -> None:
        """The twin of quantised weights."""
        for name, parameter in self.named_parameters():
            is_matrix = name == "head" or name.split("_")[0] in MATRICES
            if is_matrix and group <= parameter.shape[1]:
                parameter.data = rounded(parameter.detach(), bits, group, symmetric)[0]
