"""Rows and columns of a grid are attended to one by one; what only looks like a grid stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend

from effopt.passes.attention.split_attention_by_axis import SplitAttentionByAxis
from tests.passes.conftest import reasons_of, run_compared

NAME = SplitAttentionByAxis.name
LOWEST = torch.finfo(torch.float32).min


def row(at: Tensor, width: int) -> Tensor:
    return at // width == at[:, None] // width


def column(at: Tensor, width: int) -> Tensor:
    return at % width == at[:, None] % width


def causal(at: Tensor) -> Tensor:
    return at <= at[:, None]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("line", [row, column])
@pytest.mark.parametrize(("t", "width"), [(63, 9), (63, 7), (100, 50), (4, 2)])
def test_lines_of_a_grid(t: int, width: int, line: Callable[..., Tensor], is_causal: bool) -> None:
    """Values, with grouped queries."""

    def masked(q: Tensor, k: Tensor) -> Tensor:
        at = torch.arange(t)
        seen = line(at, width) & causal(at) if is_causal else line(at, width)
        return attend(q, k, k, attn_mask=seen, enable_gqa=True)

    q, k = torch.randn(3, 4, t, 8), torch.randn(3, 2, t, 8)
    with torch.no_grad():
        _, report = run_compared(masked, q, k)
    (applied,) = [a for a in report.applied if a.pass_name == NAME]
    length = width if line is row else t // width
    assert f"{t * t} scores become {t * length}" in applied.note


@pytest.mark.parametrize("line", [row, column])
def test_gradients(line: Callable[..., Tensor]) -> None:
    def biased(q: Tensor) -> Tensor:
        hidden = torch.where(line(torch.arange(12), 4), 0.0, LOWEST)
        return (q @ q.mT + hidden).softmax(-1) @ q

    q = torch.randn(2, 2, 12, 8, requires_grad=True)
    out, report = run_compared(biased, q)
    assert report.counts[NAME] == 1
    (got,) = torch.autograd.grad(out.square().sum(), q)
    (want,) = torch.autograd.grad(biased(q).square().sum(), q)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_a_mask_that_is_only_evaluated() -> None:
    def tiled(q: Tensor) -> Tensor:
        lane = torch.arange(4).repeat(3)
        return attend(q, q, q, attn_mask=lane[:, None] == lane)

    with torch.no_grad():
        _, report = run_compared(tiled, torch.randn(2, 2, 12, 8))
    assert report.counts[NAME] == 1


def test_the_batch_may_be_symbolic_and_the_length_not() -> None:
    def masked(q: Tensor) -> Tensor:
        return attend(q, q, q, attn_mask=row(torch.arange(q.shape[2]), 4))

    q = torch.randn(3, 2, 12, 8)
    torch._dynamo.mark_dynamic(q, 0)
    with torch.no_grad():
        _, report = run_compared(masked, q)
        assert report.counts[NAME] == 1, reasons_of(report, NAME)
        q = torch.randn(3, 2, 12, 8)
        torch._dynamo.mark_dynamic(q, 2)
        _, report = run_compared(masked, q)
    assert NAME not in report.counts
    assert "not known to be the same positions" in reasons_of(report, NAME)


def test_under_inductor() -> None:
    def axial(x: Tensor) -> Tensor:
        return attend(x, x, x, attn_mask=column(torch.arange(24), 6))

    with torch.no_grad():
        _, report = run_compared(axial, torch.randn(2, 2, 24, 8), lowering="auto")
    assert report.counts[NAME] == 1


@pytest.mark.parametrize(
    ("keep", "reason"),
    [
        (lambda at: (at + 1) % 4 == at[:, None] % 4, "counted from 0"),
        (lambda at: at % 4 == at[:, None] % 3, "counted from 0"),
        (lambda at: at % 5 == at[:, None] % 5, "not whole rows of 5"),
        (lambda at: (at % 4 == at[:, None] % 4) & (at > at[:, None] - 9), "only causality is kept"),
        (lambda at: row(at, 4) & column(at, 2), "groups of two kinds"),
        (lambda at: row(at, 4) | (at == 0), ""),
        (lambda at: row(at, 4) ^ (at == 7), ""),
        (lambda at: torch.fmod(at - 6, 4) == torch.fmod(at[:, None] - 6, 4), ""),
    ],
)
def test_look_alikes_stay(keep: Callable[[Tensor], Tensor], reason: str) -> None:
    def masked(q: Tensor) -> Tensor:
        return attend(q, q, q, attn_mask=keep(torch.arange(12)))

    with torch.no_grad():
        _, report = run_compared(masked, torch.randn(2, 2, 12, 8))
    assert NAME not in report.counts
    assert reason in reasons_of(report, NAME)


def test_a_remainder_of_negative_numbers_is_read_as_it_is() -> None:
    """`%` has the sign of the divisor: the columns of a grid that is counted from -12 are the same ones."""

    def masked(q: Tensor) -> Tensor:
        at = torch.arange(12)
        return attend(q, q, q, attn_mask=(at - 12) % 4 == (at[:, None] - 12) % 4)

    with torch.no_grad():
        _, report = run_compared(masked, torch.randn(2, 2, 12, 8))
    assert report.counts[NAME] == 1


def test_chunked_layers_of_a_model() -> None:
    """Llama 4: causal within chunks in three layers of four."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, intermediate_size_mlp=32, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2, use_cache=False,
        attention_chunk_size=4, attn_implementation="sdpa", pad_token_id=0, moe_layers=[],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Llama4ForCausalLM(config).eval()
    ids = torch.randint(1, 64, (2, 16))

    def logits(ids: Tensor) -> Tensor:
        return model(input_ids=ids).logits

    with torch.no_grad():
        _, report = run_compared(logits, ids)
    assert report.counts[NAME] == 3, reasons_of(report, NAME)
