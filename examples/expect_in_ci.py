"""A test that fails when a model loses a fusion: put it beside your model's own tests.

The second half shows the failure: attention in a form that nobody knows.
"""

import torch
from torch import nn
from torch.nn import functional as F

import effopt

EXPECTED = {"ops": {"attention": 1, "linear": 4}}


class Attention(nn.Module):
    def __init__(self, strange: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.strange = strange

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1) * 8**-0.5
        weights = F.softmax(scores, dim=-2 if self.strange else -1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))


def report_of(model: nn.Module) -> effopt.Report:
    with torch.no_grad():
        return effopt.explain(model, torch.randn(2, 16, 32), options={"lowering": "eager"})


def test_attention_is_recognised() -> None:
    effopt.expect(report_of(Attention()), EXPECTED)


if __name__ == "__main__":
    test_attention_is_recognised()
    print("as expected:", EXPECTED)
    try:
        effopt.expect(report_of(Attention(strange=True)), EXPECTED)
    except effopt.UnexpectedOps as lost:
        print("\nthe same with a softmax over queries:", lost, sep="\n")
    else:
        raise SystemExit("a softmax over queries is not attention")
