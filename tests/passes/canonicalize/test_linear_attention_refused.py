"""What only looks like linear attention, and what each is left alone for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.passes.canonicalize.linear_attention_cases import Layer, apart, recognised
from tests.passes.conftest import run_compiled


def _softmax(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(apart(q.shape[2]) < 0, -torch.inf).softmax(-1) @ v


def _turned_clamp(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    """Ahead of the query, where it is then masked, it decays; behind it is 1."""
    return (q @ k.mT * 0.9 ** (-apart(q.shape[2])).clamp(min=0)).tril() @ v


def _compared_clamp(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    """Hides the diagonal and all ahead of it, as |query - key| >= 1 would not."""
    back = apart(q.shape[2], torch.float32)
    return (q @ k.mT * (back.clamp(min=0) >= 1)) @ v


def _turned(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return (q @ k.mT * (0.9 ** -apart(q.shape[2])).tril()) @ v


def _by_batch(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    rates = q.mean((1, 2, 3), keepdim=True)
    return (q @ k.mT * torch.exp(rates * apart(q.shape[2])).tril()) @ v


def _shifted(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return (q @ k.mT * (0.9 ** (apart(q.shape[2]) + 1)).tril()) @ v


def _padded(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    keep = torch.arange(q.shape[2]) > q.mean().long()
    return (q @ k.mT).masked_fill((apart(q.shape[2]) < 0) | ~keep, 0.0) @ v


def _clipped(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return (q @ k.mT).tril().clamp(max=1.0) @ v


def _longer_rates(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    """The rates of the first heads of more: a view that is not whole."""
    rates = torch.cat([rate, rate])[: q.shape[1]]
    return (q @ k.mT * torch.exp(rates[:, None, None] * apart(q.shape[2])).tril()) @ v


def _whole_rates(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    """-1, -2, ... in bytes, where a sign wraps."""
    rates = torch.arange(1, q.shape[1] + 1, dtype=torch.uint8)
    return (q @ k.mT * torch.exp(-rates[:, None, None] * apart(q.shape[2], torch.float32)).tril()) @ v


def _whole_powers(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    """Powers of 3 in int64, which wrap at the 41st."""
    powers = torch.full((), 3) ** apart(q.shape[2]).clamp(min=0)
    return (q @ k.mT * powers.tril()) @ v


def _narrowed(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return (q @ k.mT * 1e6).tril().half().float() @ v.nan_to_num()


def _narrowed_decay(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    decay = (0.1 ** apart(q.shape[2]).clamp(min=0)).half().float()
    return (q @ k.mT * decay).tril() @ v


def _narrow_decay(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    decay = torch.exp(rate.bfloat16()[:, None, None] * apart(q.shape[2]).clamp(min=0))
    return (q @ k.mT * decay).tril() @ v


def _no_channel(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return (q * (k * v[..., 0].unsqueeze(-1)).cumsum(2)).sum(-1).unsqueeze(-1)


def _two_channels(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    states = torch.einsum("bhtd,bhtef->bhtdef", k, v.unflatten(-1, (2, -1))).cumsum(2)
    return torch.einsum("bhtd,bhtdef->bhtef", q, states).flatten(-2)


def _halves(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    hidden = torch.div(apart(q.shape[2], torch.float32), 2.0, rounding_mode="floor") == 0
    return (q @ k.mT).masked_fill(hidden, 0.0) @ v


def _reversed(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    states = (k.unsqueeze(-1) * v.unsqueeze(-2)).flip(2).cumsum(2).flip(2)
    return (q.unsqueeze(-1) * states).sum(-2)


REFUSED: dict[str, tuple[Callable[..., Tensor], str]] = {
    "softmax": (_softmax, ""),
    "decay ahead of the query": (_turned_clamp, "clamp"),
    "growing": (_turned, "the decay grows"),
    "a rate a batch entry": (_by_batch, "not one number a head"),
    "a power of the distance and one": (_shifted, "not a power of query index - key index"),
    "padding": (_padded, "more than causal"),
    "weights that are clipped": (_clipped, ""),
    "a clamp in a comparison": (_compared_clamp, "not known to be causal"),
    "time turned": (_reversed, ""),
    "the first rates of more": (_longer_rates, "not one number a head"),
    "rates that wrap": (_whole_rates, "holds whole numbers"),
    "powers that wrap": (_whole_powers, "the decay is rounded to torch.int64"),
    "scores that are rounded": (_narrowed, "are rounded to torch.float16"),
    "decay that is rounded": (_narrowed_decay, "the decay is rounded to torch.float16"),
    "a rate of less digits": (_narrow_decay, "the decay is rounded to torch.bfloat16"),
    "values without a channel": (_no_channel, "0 channel dimensions"),
    "values of two channels": (_two_channels, "2 channel dimensions"),
    "a mask by floor division": (_halves, "more than causal"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_look_alikes(name: str) -> None:
    attend, reason = REFUSED[name]
    layer, x = Layer(attend), torch.randn(2, 12, 8)
    with torch.no_grad():
        out, report = run_compiled(layer, x)
        torch.testing.assert_close(out, layer(x), rtol=2e-5, atol=2e-5, equal_nan=True)
    assert not recognised(report)
    assert not any("raised" in r.reason for r in report.rejected), report.rejected
    reasons = [r.reason for r in report.rejected if "linear" in r.pass_name or "cumulative" in r.pass_name]
    assert not reason or any(reason in r for r in reasons), reasons


def test_minimax_says_why_its_blocks_stay() -> None:
    """Its decay between the tokens of a block is a buffer: the graph does not show whether it is causal."""
    from transformers import MiniMaxConfig, MiniMaxModel

    config = MiniMaxConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, head_dim=8, block_size=8,
        layer_types=["linear_attention", "linear_attention"],
    )  # fmt: skip
    model = MiniMaxModel(config).eval()
    attention = model.layers[0].self_attn
    x = torch.randn(1, 8, 16)
    with torch.no_grad():
        out, report = run_compiled(lambda x: attention(x, None, None)[0], x)
        torch.testing.assert_close(out, attention(x, None, None)[0])
    assert not recognised(report)
    reasons = [r.reason for r in report.rejected if r.pass_name == "recognize-linear-attention"]
    assert any("(an input), which is not known to be causal" in r for r in reasons), reasons
