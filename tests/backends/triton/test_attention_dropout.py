"""Dropout of flash attention: the mask that it draws, its statistics, and gradients under that very mask."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from effopt.backends.triton.decode_attention import DECODE_ATTENTION
from effopt.backends.triton.flash_attention import FLASH_ATTENTION
from effopt.graph import ops
from tests.backends.triton.attention_calls import assert_attention_gradients
from tests.backends.triton.attention_cases import LEAST, heads
from tests.backends.triton.calls import H100

SEED = 11


def kept(shape: tuple[int, int, int, int], p: float, device: Any, d: int = 16) -> Tensor:
    """Which of the weights `[b, h, t, s]` a call after `manual_seed(SEED)` keeps: values are an identity."""
    b, h, t, s = shape
    q, k = torch.zeros(b, h, t, d, device=device), torch.zeros(b, h, s, d, device=device)
    torch.manual_seed(SEED)
    weights = FLASH_ATTENTION.call(
        q, k, torch.eye(s, device=device).expand(b, h, s, s), scale=1.0, dropout_p=p
    )
    seen = weights != 0
    expected = torch.full_like(weights, 1.0 / (s * (1.0 - p)))
    torch.testing.assert_close(weights[seen], expected[seen])
    return seen


def test_kept_fraction(device: torch.device) -> None:
    """Within four standard deviations, for each probability, in each word of the generator's four."""
    for p in (0.1, 0.5, 0.9):
        seen = kept((2, 2, 64, 128), p, device).double()
        for part in (seen, *(seen[..., word::4] for word in range(4)), seen[0], seen[:, 1], seen[:, :, ::2]):
            deviation = math.sqrt(p * (1.0 - p) / part.numel())
            assert abs(float(part.mean()) - (1.0 - p)) < 4.0 * deviation


def test_entries_heads_rows_and_keys_are_independent(device: torch.device) -> None:
    """Neighbours agree as often as chance has it."""
    seen = kept((2, 2, 64, 128), 0.5, device)
    pairs = (
        (seen[0], seen[1]), (seen[:, 0], seen[:, 1]), (seen[:, :, 1:], seen[:, :, :-1]),
        (seen[..., 1:], seen[..., :-1]), (seen[..., 4:], seen[..., :-4]), (seen[..., :64], seen[..., 64:]),
    )  # fmt: skip
    for a, b in pairs:
        assert abs(float((a == b).double().mean()) - 0.5) < 4.0 * 0.5 / math.sqrt(a.numel())


def test_the_mask_is_of_its_place_alone(device: torch.device) -> None:
    """The same whatever tiles a head size has, and whatever more rows and keys there are."""
    small, wide = kept((1, 2, 9, 40), 0.3, device), kept((1, 2, 33, 80), 0.3, device, d=130)
    assert torch.equal(small, wide[:, :, :9, :40])


def test_seed_is_of_torch(device: torch.device) -> None:
    q, k, v = heads(5, 33, 16, device)

    def draw() -> Tensor:
        return FLASH_ATTENTION.call(q, k, v, scale=0.3, dropout_p=0.4)

    torch.manual_seed(SEED)
    first, second = draw(), draw()
    torch.manual_seed(SEED)
    assert torch.equal(draw(), first)
    assert not torch.equal(first, second)


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"low": -6, "high": 2},
    "causal, filled": {"is_causal": True, "low": -5, "fill": LEAST, "mask": torch.rand(20, 33) > 0.4},
    "blind rows": {"high": -3, "zero_masked_rows": True},
    "packed, anchors": {"query_ids": torch.arange(20) // 7, "key_ids": torch.arange(33) // 7, "anchors": 2},
    "soft-cap, sinks, bias": {"softcap": 2.0, "sinks": torch.randn(4), "bias": torch.randn(4, 20, 33)},
}


@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients_under_the_mask(name: str, device: torch.device) -> None:
    """The reference with its own draw replaced by the kernel's, forward and backward."""
    p, (t, s) = 0.3, (20, 33)
    seen = kept((2, 4, t, s), p, device)

    def reference(**given: Any) -> Tensor:
        given = {k: v for k, v in given.items() if k != "dropout_p"}
        v = given["value"]
        eye = torch.eye(s, dtype=v.dtype, device=device).expand(2, 2, s, s)
        weights = ops.attention.reference(**{**given, "value": eye})
        return (weights * seen / (1.0 - p)) @ v.repeat_interleave(2, dim=1)

    more = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in CALLS[name].items()}
    made = heads(t, s, 16, device, b=2, h=4, hkv=2)
    given = {"scale": 0.3, **more, "dropout_p": p}
    upstream = torch.randn_like(made[0])
    torch.manual_seed(SEED)
    got = FLASH_ATTENTION.call(*made, **given)
    exact = reference(**dict(zip(("query", "key", "value"), made, strict=True)), **given)
    torch.testing.assert_close(got, exact, rtol=2e-5, atol=1e-5)
    torch.manual_seed(SEED)
    assert_attention_gradients(made, given, reference, upstream)


def test_all_dropped(device: torch.device) -> None:
    made = tuple(x.requires_grad_() for x in heads(5, 20, 16, device))
    out = FLASH_ATTENTION.call(*made, scale=0.3, dropout_p=1.0)
    assert not out.any()
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), made))


def test_compiled_training_draws_afresh(device: torch.device) -> None:
    """The seed is a value of the graph: each call has another, and its backward pass the same."""

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return FLASH_ATTENTION.call(q, k, v, scale=0.3, dropout_p=0.4, is_causal=True)

    compiled = torch.compile(
        step, backend=aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph)), fullgraph=True
    )
    made = tuple(x.requires_grad_() for x in heads(7, 20, 16, device))
    torch.manual_seed(SEED)
    outs = [compiled(*made) for _ in range(2)]
    assert not torch.equal(*outs)
    found = [torch.autograd.grad(out.sum(), made) for out in outs]
    torch.manual_seed(SEED)
    for out, gradients in zip(outs, found, strict=True):
        eager = step(*made)
        assert torch.equal(out, eager)
        assert all(map(torch.equal, gradients, torch.autograd.grad(eager.sum(), made)))


def test_who_takes_dropout() -> None:
    bound = ops.attention.bind(heads(3, 5, 8, "cpu"), {"scale": 1.0, "dropout_p": 0.1})
    assert FLASH_ATTENTION.supports(H100, bound) is None
    assert "dropout of 0.1" in (DECODE_ATTENTION.supports(H100, bound) or "")
    with pytest.raises(ValueError, match=r"dropout of 0\.1, and the kernel has none"):
        DECODE_ATTENTION.call(*heads(3, 5, 8, "cpu"), scale=1.0, dropout_p=0.1)
