"""Keys that the batch shares are attended to once: caches of transformers, bytes, and what stays whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as attend

from effopt.compile import record
from effopt.graph import ops
from effopt.graph.ops.base import tensor_bytes
from effopt.passes.attention.split_shared_prefix import SplitSharedPrefix
from tests.models.architectures import build
from tests.passes.conftest import reasons_of, run_compared

NAME = SplitSharedPrefix.name


def prefilled(model: torch.nn.Module, prefix: Tensor, batch: int) -> Any:
    """A cache of one prompt, expanded to a batch: no memory is copied."""
    transformers = pytest.importorskip("transformers")
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=prefix, past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.keys, layer.values = (x.expand(batch, -1, -1, -1) for x in (layer.keys, layer.values))
    return cache


@pytest.mark.parametrize(("t", "lowering"), [(1, "eager"), (3, "eager"), (3, "auto")])
def test_llama_over_an_expanded_cache(t: int, lowering: str) -> None:
    """The same compiled call is then given a cache that is not shared: its strides are guarded."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, _ = build("llama", "sdpa", use_cache=True, num_hidden_layers=1)
    prefix, ids = torch.randint(0, 50, (1, 90)), torch.randint(0, 50, (8, t))
    run = torch.compile(model, backend="effopt", options={"lowering": lowering})
    with record() as report, torch.no_grad():
        got = run(input_ids=ids, past_key_values=prefilled(model, prefix, 8)).logits
        want = model(input_ids=ids, past_key_values=prefilled(model, prefix, 8)).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert report.counts[NAME] == model.config.num_hidden_layers
    if lowering == "auto":  # one graph for Inductor is enough
        return
    cache = prefilled(model, prefix, 8)
    for layer in cache.layers:
        layer.keys, layer.values = torch.randn(layer.keys.shape), torch.randn(layer.keys.shape)
    with torch.no_grad():
        got = run(input_ids=ids, past_key_values=copy.deepcopy(cache)).logits
        torch.testing.assert_close(
            got, model(input_ids=ids, past_key_values=cache).logits, rtol=1e-4, atol=1e-4
        )


def over(q: Tensor, prefix: Tensor, own: Tensor, **given: Any) -> Tensor:
    k = torch.cat([prefix.expand(q.shape[0], -1, -1, -1), own], 2)
    return attend(q, k, k, **given)


Q, PREFIX, OWN = torch.randn(8, 4, 1, 8), torch.randn(1, 2, 100, 8), torch.randn(8, 2, 9, 8)


def test_bytes_of_the_prefix_are_read_once() -> None:
    """The library's cost of keys and values: b times the prefix before, once afterwards."""
    b, hkv, prefix, d = 8, 2, 100, 8
    _, report = run_compared(lambda q, p, own: over(q, p, own, enable_gqa=True), Q, PREFIX, OWN)
    (applied,) = [a for a in report.applied if a.pass_name == NAME]
    assert applied.note.startswith(f"{(b - 1) * prefix * hkv * 2 * d * 4} bytes")
    one = tensor_bytes(torch.empty(1, hkv, prefix, d)) * 2
    q = torch.empty(1, 4, b, d)
    folded = {"query": q, "key": torch.empty(1, hkv, prefix, d), "value": torch.empty(1, hkv, prefix, d)}
    moved = ops.attention_lse.bytes_moved(folded, ())
    assert moved == one + tensor_bytes(q)


@pytest.mark.parametrize("dynamic", [None, True])
def test_padded_suffix(dynamic: bool | None) -> None:
    """A mask over keys, of the suffix and of the prefix, is that of each batch entry."""
    seen = torch.rand(8, 1, 1, 109) > 0.3
    seen[2] = False  # nothing at all: SDPA gives 0

    def masked(q: Tensor, prefix: Tensor, own: Tensor, seen: Tensor) -> Tensor:
        return over(q, prefix, own, attn_mask=seen, enable_gqa=True)

    _, report = run_compared(masked, Q, PREFIX, OWN, seen, dynamic=dynamic)
    assert report.counts.get(NAME) == 1, reasons_of(report, NAME)


def test_contexts_in_parallel() -> None:
    def attended(q: Tensor, one: Tensor, other: Tensor, own: Tensor) -> Tensor:
        k = torch.cat([one.expand(8, -1, -1, -1), other.expand(8, -1, -1, -1), own], 2)
        return attend(q, k, k, enable_gqa=True)

    _, report = run_compared(attended, Q, PREFIX, torch.randn(1, 2, 63, 8), OWN)
    assert report.ops["attention_lse"] == 3
    assert report.ops["merge_attention"] == 2


def test_a_window_that_hides_the_prefix_is_refused() -> None:
    def windowed(q: Tensor, prefix: Tensor, own: Tensor) -> Tensor:
        at = torch.arange(100 + own.shape[2])
        near = at > at[100:, None] - 20
        return over(q, prefix, own, attn_mask=near & (at <= at[100:, None]), enable_gqa=True)

    _, report = run_compared(windowed, torch.randn(8, 4, 9, 8), PREFIX, OWN)
    assert NAME not in report.counts
    assert "a window hides" in reasons_of(report, NAME)


def test_a_row_that_gives_nan_is_refused() -> None:
    def masked(q: Tensor, prefix: Tensor, own: Tensor, seen: Tensor) -> Tensor:
        k = torch.cat([prefix.expand(8, -1, -1, -1), own], 2)
        return (q @ k.mT).masked_fill(~seen, -torch.inf).softmax(-1) @ k

    seen = torch.rand(8, 1, 1, 109) > 0.3
    _, report = run_compared(masked, Q[:, :2], PREFIX, OWN, seen)
    assert NAME not in report.counts
    assert "may see no key" in reasons_of(report, NAME)


def test_values_of_another_batch_are_refused() -> None:
    def attended(q: Tensor, prefix: Tensor, own: Tensor, values: Tensor) -> Tensor:
        k = torch.cat([prefix.expand(8, -1, -1, -1), own], 2)
        return attend(q, k, torch.cat([values, own], 2), enable_gqa=True)

    _, report = run_compared(attended, Q, PREFIX, OWN, torch.randn(8, 2, 100, 8))
    assert NAME not in report.counts
    assert "is proved to be the same" in reasons_of(report, NAME)
