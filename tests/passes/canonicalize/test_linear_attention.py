"""Linear attention in the spellings of models: recognised, run in chunks, trained; look-alikes stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effopt.backends.chunked_linear_attention import chunked_linear_attention
from effopt.compile import record
from effopt.graph import ops
from tests.passes.conftest import run_compiled

T = 70


def apart(t: int, dtype: torch.dtype = torch.int64) -> Tensor:
    place = torch.arange(t, dtype=dtype)
    return place[:, None] - place


def triangle(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return (q @ k.mT * torch.ones(q.shape[2], q.shape[2]).tril()) @ v


def boolean(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(apart(q.shape[2]) < 0, 0.0) @ v


def retention(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    back = apart(q.shape[2], torch.float32)
    decay = torch.where(back >= 0, torch.exp(-rate.abs()[:, None, None] * back), 0.0)
    return (q @ k.mT * q.shape[-1] ** -0.5 * decay) @ v


def masked_logarithm(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    back = apart(q.shape[2])
    log = (rate[:, None, None] * back).masked_fill(back < 0, -torch.inf)
    return (torch.einsum("bhid,bhjd->bhij", q, k) * log.exp()) @ v


def learned_base(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    powers = rate.sigmoid().view(1, -1, 1, 1) ** apart(q.shape[2]).clamp(min=0)
    return (q @ k.mT * powers).tril() @ v


def one_base(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return (q @ k.mT * (0.97 ** apart(q.shape[2]).abs().float()).tril()) @ v


def normalised(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    q, k = (nn.functional.elu(x) + 1 for x in (q, k))
    weights = (q @ k.mT).tril()
    return (weights @ v) / weights.sum(-1, keepdim=True).clamp(min=1e-6)


def cumulative(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    q, k = (nn.functional.elu(x) + 1 for x in (q, k))
    states = torch.einsum("bhtd,bhte->bhtde", k, v).cumsum(2)
    out = torch.einsum("bhtd,bhtde->bhte", q, states)
    return out / ((q * k.cumsum(2)).sum(-1, keepdim=True) + 1e-6)


def cumulative_rows(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    states = torch.cumsum(k[..., :, None] * v[..., None, :], dim=2)
    return (q[..., None, :] @ states).squeeze(-2)


SPELLINGS = {
    f.__name__: f
    for f in (triangle, boolean, retention, masked_logarithm, learned_base, one_base, normalised, cumulative,
              cumulative_rows)
}  # fmt: skip


BUFFERS = {
    "float": (torch.ones(T, T).tril(), lambda scores, mask: scores * mask),
    "float, compared": (
        torch.ones(1, 1, T, T).tril(),
        lambda scores, mask: scores.masked_fill(mask == 0, 0.0),
    ),
    "bool": (torch.ones(T, T).tril().bool(), lambda scores, mask: scores.masked_fill(~mask, 0.0)),
    "bool, a factor": (torch.ones(T, T).tril().bool(), lambda scores, mask: scores * mask.to(scores.dtype)),
    "bool, of what is hidden": (torch.ones(T, T).triu(1).bool(), lambda x, mask: x.masked_fill(mask, 0.0)),
    "bytes": (torch.ones(T, T).tril().byte(), lambda scores, mask: scores.masked_fill(mask == 0, 0.0)),
    "bytes, as truths": (torch.ones(T, T).tril().byte(), lambda x, mask: x.where(mask.bool(), 0.0)),
}


class Held(nn.Module):
    """Attends by a mask in a registered buffer, longer than the sequence."""

    def __init__(self, mask: Tensor, use: Any) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.use = use

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Any:
        t, mask = q.shape[2], self.mask
        assert isinstance(mask, Tensor)
        return self.use(q @ k.mT, mask[..., :t, :t]) @ v


class Layer(nn.Module):
    def __init__(self, attend: Any, heads: int = 3, size: int = 8) -> None:
        super().__init__()
        self.attend, self.heads = attend, heads
        self.qkv = nn.Linear(size, 3 * heads * size)
        self.rate = nn.Parameter(-torch.rand(heads))

    def forward(self, x: Tensor) -> Tensor:
        b, t, size = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, size).permute(2, 0, 3, 1, 4)
        return self.attend(q, k, v, self.rate).transpose(1, 2).reshape(b, t, -1)


def recognised(report: Any) -> int:
    return report.counts["recognize-linear-attention"] + report.counts["recognize-cumulative-attention"]


@pytest.mark.parametrize("name", SPELLINGS)
def test_inference_and_training(name: str) -> None:
    torch.manual_seed(0)
    layer, x = Layer(SPELLINGS[name]), torch.randn(2, T, 8)
    with torch.no_grad():
        out, report = run_compiled(layer, x)
        torch.testing.assert_close(out, layer(x), rtol=2e-5, atol=2e-5)
    assert recognised(report) == (2 if name == "normalised" else 1), report.rejected
    out, report = run_compiled(layer, x)
    assert recognised(report) >= 1
    leaves = list(layer.parameters())
    found = [torch.autograd.grad(y.square().sum(), leaves, allow_unused=True) for y in (out, layer(x))]
    for got, wanted in zip(*found, strict=True):
        if wanted is None:
            assert got is None
        else:
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", BUFFERS)
def test_mask_in_a_buffer(name: str) -> None:
    """Recognised under a guard; what is written into the buffer later holds."""
    layer, x = Layer(Held(*BUFFERS[name])), torch.randn(2, T - 3, 8)
    with torch.no_grad(), record() as report:
        compiled = torch.compile(layer, backend="effopt", options={"lowering": "eager"})
        torch.testing.assert_close(compiled(x), layer(x), rtol=2e-5, atol=2e-5)
        assert recognised(report) == 1, report.rejected
        layer.attend.mask[..., 5, 2] = 0 if "hidden" not in name else 1
        torch.testing.assert_close(compiled(x), layer(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("lowering", ["eager", "auto"])
@pytest.mark.parametrize("t", [6, 1200])
def test_a_cumulative_sum_keeps_infinity_from_what_comes_before(t: int, lowering: str) -> None:
    """As in eager mode, which takes no 0 * infinity; short calls are the reference, long ones chunks."""
    q, k, v = (torch.randn(1, 2, t, 4) for _ in range(3))
    v[:, :, -1], v[0, 1, t // 2, 0] = torch.inf, torch.nan
    call = lambda q, k, v: cumulative_rows(q, k, v, q)  # noqa: E731
    out, report = run_compiled(call, q, k, v, lowering=lowering)
    wanted = call(q, k, v)
    assert recognised(report) == 1
    seen = wanted.isfinite()
    assert torch.equal(out.isfinite(), seen)
    assert bool(seen[:, :, : t // 2].all())
    torch.testing.assert_close(out[seen], wanted[seen], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["triangle", "retention", "cumulative"])
def test_dynamic_lengths(name: str) -> None:
    layer = Layer(SPELLINGS[name])
    compiled = torch.compile(layer, backend="effopt", options={"lowering": "eager"}, dynamic=True)
    with torch.no_grad():
        for t in (T, 9, 130):
            x = torch.randn(2, t, 8)
            torch.testing.assert_close(compiled(x), layer(x), rtol=2e-5, atol=2e-5)


def test_under_inductor_long_sequences_run_in_chunks() -> None:
    layer, x = Layer(retention), torch.randn(1, 1200, 8)
    with torch.no_grad():
        out, report = run_compiled(layer, x, lowering="auto")
        torch.testing.assert_close(out, layer(x), rtol=2e-5, atol=2e-5)
    (lowered,) = (low for graph in report.graphs for low in graph.lowerings if low.op == "linear_attention")
    assert lowered.kernel == "chunked"


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


def test_a_decode_loop_is_the_parallel_form() -> None:
    """A prompt in chunks, then token by token with the state that it left."""
    q, k, v = (torch.randn(1, 2, 40, 8, dtype=torch.float64) for _ in range(3))
    decay = -torch.rand(2, dtype=torch.float64)
    whole, last = ops.linear_attention.reference(q, k, v, scale=0.3, decay=decay)
    head = [x[:, :, :33] for x in (q, k, v)]
    out, state = chunked_linear_attention(*head, scale=0.3, decay=decay)
    parts = [out]
    for i in range(33, 40):
        token = [x[:, :, i : i + 1] for x in (q, k, v)]
        out, state = torch.ops.effopt.linear_attention(*token, scale=0.3, decay=decay, state=state)
        parts.append(out)
    torch.testing.assert_close((torch.cat(parts, 2), state), (whole, last))
