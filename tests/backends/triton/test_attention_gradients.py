"""Gradients of flash attention against the reference's in float64, and what is not read for them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from effopt.backends.triton import attention_tiles, flash_attention_backward
from effopt.backends.triton.attention_gradients import backward_tile_for
from effopt.backends.triton.attention_refusals import prepare
from effopt.backends.triton.flash_attention import FLASH_ATTENTION
from effopt.graph import ops
from tests.backends.triton.attention_calls import assert_attention_gradients, attention_gradients
from tests.backends.triton.attention_cases import LEAST, heads, kinds

FLASH = torch.ops.effopt_triton.flash_attention


@pytest.mark.parametrize("kind", kinds(2, 2, "cpu"))
def test_kinds_of_masks(kind: str, device: torch.device) -> None:
    """Tiles that are whole, ragged, passed over; rows of one key or none, filled, zero and NaN."""
    t, s = 18, 33
    assert_attention_gradients(heads(t, s, 16, device), {"scale": 0.3, **kinds(t, s, device)[kind]})


@pytest.mark.parametrize(
    ("t", "s", "d", "dv"),
    [(1, 1, 16, 16), (1, 63, 5, 3), (63, 1, 16, 1), (33, 100, 1, 63), (40, 40, 100, 40)],
)
def test_odd_sizes(t: int, s: int, d: int, dv: int, device: torch.device) -> None:
    made = heads(t, s, d, device, h=1, hkv=1, dv=dv)
    assert_attention_gradients(made, {"scale": d**-0.5, "is_causal": True})


@pytest.mark.parametrize("sizes", [(6, 2), (5, 1), (3, 3)], ids=str)
def test_groups(sizes: tuple[int, int], device: torch.device) -> None:
    """Keys sum over the heads of their group: tiles of rows begin and end within a query."""
    h, hkv = sizes
    made = heads(7, 20, 8, device, b=2, h=h, hkv=hkv)
    assert_attention_gradients(made, {"scale": 0.3, "low": -3, "high": 9})


def test_long_heads(device: torch.device) -> None:
    assert_attention_gradients(heads(5, 20, 256, device, dv=192), {"scale": 1 / 16, "high": 15})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_dtypes(dtype: torch.dtype, device: torch.device) -> None:
    made = heads(18, 33, 16, device, dtype=dtype)
    bias = torch.randn(2, 18, 33, device=device, dtype=dtype)
    assert_attention_gradients(made, {"scale": 0.25, "bias": bias, "high": 15})
    assert_attention_gradients(made, {"scale": 0.25, "sinks": bias[:, 0, 0], "is_causal": True})


@pytest.mark.parametrize("window", [{}, {"softcap": 3.0, "zero_masked_rows": True}], ids=["plain", "capped"])
def test_tiles_of_newer_gpus(
    window: dict[str, Any], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 keys a step, forward and in the gradient of keys, as where matrix units read shared memory."""
    for module in (attention_tiles, flash_attention_backward):
        monkeypatch.setattr(module, "reads_shared_memory", lambda _: True)
    made = heads(70, 130, 80, device, h=2, hkv=1, dtype=torch.bfloat16)
    assert_attention_gradients(made, {"scale": 0.1, "low": -90, "high": 55, **window})


@pytest.mark.parametrize(
    "shape",
    [(2, 4, 9, 20), (1, 4, 9, 20), (9, 20), (4, 1, 20), (2, 1, 1, 20), (9, 1), (4, 1, 1), (1,)],
    ids=str,
)
def test_bias_of_any_shape(shape: tuple[int, ...], device: torch.device) -> None:
    """Summed over what it is broadcast over: batch, heads of all groups, queries, keys."""
    bias = torch.randn(shape, device=device)
    sinks = torch.randn(4, device=device)  # without them a bias that rows share has a gradient of 0
    made = heads(9, 20, 16, device, b=2, h=4, hkv=2)
    assert_attention_gradients(made, {"scale": 0.3, "bias": bias, "sinks": sinks, "softcap": 3.0, "low": -2})


def test_documents_without_keys(device: torch.device) -> None:
    """Rows of a document that has none, and keys that no row asks for."""
    ids = (
        torch.tensor([0] * 7 + [3] * 9 + [5] * 4, device=device),
        torch.tensor([0] * 20 + [4] * 20, device=device),
    )
    for more in ({"zero_masked_rows": True}, {"fill": LEAST}, {}):
        given = {"scale": 0.3, "query_ids": ids[0], "key_ids": ids[1], **more}
        assert_attention_gradients(heads(20, 40, 16, device), given)


def test_two_and_three_dimensions(device: torch.device) -> None:
    q, k, v = (x[0] for x in heads(9, 12, 16, device, h=3, hkv=3))
    assert_attention_gradients((q, k, v), {"scale": 0.3, "bias": torch.randn(3, 9, 12, device=device)})
    assert_attention_gradients((q[0], k[0], v[0]), {"scale": 0.3, "low": -5})


def test_layouts(device: torch.device) -> None:
    """Heads as a projection leaves them, expanded keys, and a gradient that is one element everywhere."""
    q, k, v = heads(6, 20, 16, device, b=2, h=4, hkv=2)
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    one = torch.ones((), device=device).expand(2, 4, 6, 16)
    assert_attention_gradients((turned, k.mT.contiguous().mT, v[..., ::2]), {"scale": 0.3})
    assert_attention_gradients(
        (q, k[:1, :1].expand(2, 2, 20, 16), v), {"scale": 0.3, "high": 3}, upstream=one
    )


def test_operands_that_want_none(device: torch.device) -> None:
    q, k, v = heads(6, 20, 16, device)
    bias = torch.randn(6, 20, device=device)
    every = attention_gradients(
        FLASH_ATTENTION.call, (q, k, v), {"scale": 0.3, "bias": bias}, torch.ones_like(q)
    )
    for name, x in {"query": q, "key": k, "value": v, "bias": bias}.items():
        leaf = x.detach().requires_grad_()
        given = {"query": q, "key": k, "value": v, "bias": bias, "scale": 0.3, name: leaf}
        (alone,) = torch.autograd.grad(FLASH_ATTENTION.call(**given).sum(), leaf)
        assert torch.equal(alone, every[name])


def test_bits_repeat(device: torch.device) -> None:
    """No atomics: one program for each element, in one order."""
    made = heads(20, 33, 16, device, b=2, h=4, hkv=2)
    more = {"scale": 0.3, "bias": torch.randn(4, 20, 33, device=device), "low": -9}
    upstream = torch.randn(2, 4, 20, 16, device=device)
    first, second = (attention_gradients(FLASH_ATTENTION.call, made, more, upstream) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_empty(device: torch.device) -> None:
    for sizes in ({"b": 0}, {"t": 0}, {"h": 0, "hkv": 0}, {"s": 0}):
        made = heads(sizes.pop("t", 3), sizes.pop("s", 4), 16, device, **sizes)
        found = attention_gradients(FLASH_ATTENTION.call, made, {"scale": 1.0}, torch.ones_like(made[0]))
        assert all(not g.any() and g.shape == x.shape for g, x in zip(found.values(), made, strict=True))


def test_what_no_row_of_a_tile_sees_is_not_read(device: torch.device) -> None:
    """NaN in hidden keys reaches no query, and NaN in the gradients of hidden rows reaches no key."""
    q, k, v = heads(64, 64, 16, device, h=1)
    spoiled, upstream = v.clone(), torch.randn(1, 1, 64, 16, device=device)
    spoiled[..., 32:, :] = math.nan
    found = attention_gradients(
        FLASH_ATTENTION.call,
        (q[..., :16, :], k, spoiled),
        {"scale": 0.3, "is_causal": True},
        upstream[:, :, :16],
    )
    assert all(g.isfinite().all() for g in found.values())
    lost = upstream.clone()
    lost[..., 32:, :] = math.nan
    at = torch.arange(64, device=device) // 32
    for more in ({"low": -8, "high": 0}, {"query_ids": at, "key_ids": at}):
        clean = attention_gradients(FLASH_ATTENTION.call, (q, k, v), {"scale": 0.3, **more}, upstream)
        found = attention_gradients(FLASH_ATTENTION.call, (q, k, v), {"scale": 0.3, **more}, lost)
        for name in ("query", "key", "value"):
            assert torch.equal(found[name][..., :16, :], clean[name][..., :16, :])
            assert found[name][..., 48:, :].isnan().all()


def test_log_sum_exp_has_a_gradient_and_the_sums_of_rows_have_none(device: torch.device) -> None:
    q, k, v = (x.requires_grad_() for x in heads(5, 40, 16, device))
    given = (*prepare(ops.attention.bind((q, k, v), {"scale": 0.4, "low": -2, "high": 30})), 0.0, None)
    out, lse, peak, _ = FLASH(*given)
    upstream = torch.randn_like(lse)
    found = torch.autograd.grad([lse, out], [q, k], [upstream, torch.ones_like(out)], retain_graph=True)
    apart = torch.arange(40, device=device) - torch.arange(5, device=device)[:, None]
    scores = (q.double() @ k.double().mT * 0.4).masked_fill((apart < -2) | (apart > 30), -math.inf)
    results = [scores.logsumexp(-1), scores.softmax(-1) @ v.double()]
    expected = torch.autograd.grad(results, [q, k], [upstream.double(), torch.ones_like(results[1])])
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)
    with pytest.raises(ValueError, match="log-sum-exp"):
        peak.sum().backward()


def test_opcheck(device: torch.device) -> None:
    """Schema, fake kernels, autograd registration and AOTAutograd, of the op and of its backward."""
    q, k, v = (x.requires_grad_() for x in heads(3, 7, 16, device, h=4, hkv=2))
    more = {"scale": 0.3, "low": -4, "bias": torch.randn(4, 3, 7, device=device).requires_grad_()}
    more["sinks"] = torch.randn(4, device=device).requires_grad_()
    given = prepare(ops.attention.bind((q, k, v), more))
    seed = torch.tensor([3], device=device)
    # The greatest scores have no gradient, which the check of AOTAutograd would ask for.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(FLASH.default, (*given, 0.25, seed), test_utils=checks)
    out, _, peak, total = (x.detach() for x in FLASH(*given, 0.25, seed))
    plain = (x.detach() if isinstance(x, Tensor) else x for x in given)
    arguments = (torch.randn_like(out), None, out, peak, total, [True] * 5, *plain, 0.25, seed)
    torch.library.opcheck(torch.ops.effopt_triton.flash_attention_backward.default, arguments)


def test_traced_training_with_symbolic_sizes(device: torch.device) -> None:
    """One graph forward and one backward for any batch and lengths, gradients as without it."""
    graphs = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph)

    def last_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return FLASH_ATTENTION.call(q, k, v, scale=0.3, high=k.shape[2] - q.shape[2], fill=LEAST)

    compiled = torch.compile(last_rows, backend=aot_autograd(fw_compiler=count), fullgraph=True)
    for b, t, s in ((5, 3, 11), (6, 7, 20)):
        made = heads(t, s, 16, device, b=b, h=4, hkv=2)
        upstream = torch.randn_like(made[0])
        leaves = [x.detach().requires_grad_() for x in made]
        for x in leaves:
            torch._dynamo.mark_dynamic(x, [0, 2])
        found = torch.autograd.grad(compiled(*leaves), leaves, upstream)
        given = {"scale": 0.3, "high": s - t, "fill": LEAST}
        expected = attention_gradients(FLASH_ATTENTION.call, made, given, upstream)
        assert all(torch.equal(a, b) for a, b in zip(found, expected.values(), strict=True))
    assert len(graphs) == 2


def test_a_training_step_of_llama(device: torch.device) -> None:
    """Loss and all gradients of a model of `transformers` as with its own attention, under padding."""
    transformers = pytest.importorskip("transformers", reason="the model is one of transformers")

    def flash(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> Any:
        more = {"is_causal": True} if mask is None else {"bias": mask}
        out = FLASH_ATTENTION.call(query, key, value, scale=module.scaling, **more)
        return out.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("effopt-kernel", flash)
    transformers.AttentionMaskInterface.register(
        "effopt-kernel", transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["eager"]
    )
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    tokens = torch.randint(0, 40, (2, 11), device=device)
    padding = torch.ones_like(tokens)
    padding[0, :4] = 0
    found = []
    for name in ("eager", "effopt-kernel"):
        torch.manual_seed(1)
        config._attn_implementation = name
        model = transformers.LlamaForCausalLM(config).to(device).train()
        loss = model(tokens, attention_mask=padding, labels=tokens).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for eager, got in zip(*found, strict=True):
        torch.testing.assert_close(got, eager, rtol=1e-4, atol=1e-5)


def test_tiles() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for head in (1, 64, 80, 256):
            for of in ("query", "key", "bias"):
                tiles = [backward_tile_for(of, head, dtype, dense) for dense in (False, True)]
                assert all(tile.rows >= 16 and tile.keys >= 16 for tile in tiles)
                assert tiles[1].rows * tiles[1].keys <= tiles[0].rows * tiles[0].keys


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_large_on_gpu(dtype: torch.dtype) -> None:
    """Sizes of real models, compiled."""
    for t, s, d in ((1000, 1000, 64), (333, 2000, 128), (257, 300, 256)):
        for kind, more in kinds(t, s, "cuda", h=8).items():
            if "sinks of" not in kind:
                made = heads(t, s, d, "cuda", h=8, hkv=2, dtype=dtype)
                assert_attention_gradients(made, {"scale": d**-0.5, **more})
