"""Which calls the attention kernels take, what they say of the others, and which of them is chosen."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from effopt.backends.base import Lowering, choose
from effopt.backends.native import LOWERINGS as NATIVE
from effopt.backends.reference import reference_lowering
from effopt.backends.triton import LOWERINGS, attention_tiles
from effopt.backends.triton.attention_tiles import tile_for
from effopt.graph import ops
from effopt.target import Target
from tests.backends.triton.attention_cases import DTYPES, KERNELS, every_kernel
from tests.backends.triton.calls import H100

Q = torch.zeros(2, 4, 3, 8)
K = torch.zeros(2, 2, 5, 8)
M = torch.ones(3, 5, dtype=torch.bool)
REFUSED: dict[str, tuple[tuple[Tensor, ...], dict[str, Any], str]] = {
    "dropout": ((Q, K, K), {"dropout_p": 1.5}, "dropout of 1.5"),
    "float64": ((Q.double(), K.double(), K.double()), {}, "float32 or narrower"),
    "mixed dtypes": ((Q.half(), K, K), {}, "wants one dtype"),
    "long heads": (
        (Q[..., :1].expand(2, 4, 3, 257), K[..., :1].expand(2, 2, 5, 257), K), {}, "wants 1 to 256",
    ),
    "five dimensions": ((Q[None], K[None], K[None]), {}, "wants 2 to 4"),
    "keys of another head size": ((Q, K[..., :4], K), {}, "wants [b, h, t, d]"),
    "fewer values than keys": ((Q, K, K[:, :, :4]), {}, "wants [b, h, t, d]"),
    "heads that do not group": ((Q[:, :3], K, K), {}, "wants [b, h, t, d]"),
    "one batch of keys": ((Q, K[:1], K[:1]), {}, "wants [b, h, t, d]"),
    "mask of integers": ((Q, K, K), {"mask": M.int()}, "a mask that is added is a bias"),
    "mask of other keys": ((Q, K, K), {"mask": M[:, :4]}, "not known to broadcast"),
    "mask of five dimensions": ((Q, K, K), {"mask": M[None, None, None]}, "not known to broadcast"),
    "bias in float64": ((Q, K, K), {"bias": torch.zeros(5).double()}, "bias is torch.float64"),
    "bias of other heads": ((Q, K, K), {"bias": torch.zeros(2, 3, 5)}, "not known to broadcast"),
    "fill of no number": ((Q, K, K), {"mask": M, "fill": math.nan}, "masked scores become nan"),
    "sinks of other heads": ((Q, K, K), {"sinks": torch.zeros(2)}, "wants [4]"),
    "ids of queries alone": ((Q, K, K), {"query_ids": torch.zeros(3).int()}, "wants both or none"),
    "ids of another length": (
        (Q, K, K), {"query_ids": torch.zeros(3).int(), "key_ids": torch.zeros(4).int()}, "key_ids is [4]",
    ),
    "ids in float": ((Q, K, K), {"query_ids": torch.zeros(3), "key_ids": torch.zeros(5)}, "wants integers"),
    "ids by batch without a batch": (
        (Q[0, :2], K[0], K[0]), {"query_ids": torch.zeros(1, 3).int(), "key_ids": torch.zeros(5).int()},
        "query_ids is [1, 3]",
    ),
}  # fmt: skip


@every_kernel
@pytest.mark.parametrize("case", REFUSED)
def test_refusal_says_why_and_the_call_raises(kernel: str, case: str) -> None:
    args, kwargs, expected = REFUSED[case]
    lowering, given_ = KERNELS[kernel], {"scale": 1.0, **kwargs}
    assert expected in (lowering.supports(H100, ops.attention.bind(args, given_)) or "")
    with pytest.raises((ValueError, TypeError), match=r"kernel|expected|broadcast"):
        lowering.call(*args, **given_)


@every_kernel
def test_targets_dtypes_and_training(kernel: str) -> None:
    lowering, bound = KERNELS[kernel], ops.attention.bind((Q, K, K), {"scale": 1.0})
    assert lowering in LOWERINGS
    assert lowering.differentiable == (kernel == "whole")
    assert lowering.supports(H100, bound) is None
    assert "no compiled Triton" in (lowering.supports(Target("cpu", "cpu", 1e10, 1e11), bound) or "")
    assert "is empty" in (lowering.supports(H100, bound | {"query": Q[:0]}) or "")
    assert "float8" in (lowering.supports(H100, bound | {"key": K.to(torch.float8_e4m3fn)}) or "")


def test_symbolic_sizes_add_no_guard() -> None:
    """Any batch and any numbers of queries and keys; a head size that is a symbol is refused."""

    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return q.sum() + k.sum()

    b, t, s, d = (torch.export.Dim(name) for name in ("b", "t", "s", "d"))
    for last in (None, d):
        shapes = (
            {0: b, 2: t, 3: last} if last else {0: b, 2: t},
            {0: b, 2: s, 3: last} if last else {0: b, 2: s},
        )
        exported = torch.export.export(
            Attention(), (torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8)), dynamic_shapes=shapes
        )
        q, k = (node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder")
        guards = len(q.fake_mode.shape_env.guards)
        bound = ops.attention.bind((q, k, k), {"scale": 1.0, "high": k.shape[2] - q.shape[2]})
        for lowering in KERNELS.values():
            reason = lowering.supports(H100, bound)
            assert (reason is None) == (last is None)
            assert last is None or "symbolic" in (reason or "")
            assert lowering.cost(H100, bound, q) > 0
        assert len(q.fake_mode.shape_env.guards) == guards


def chosen(t: int, s: int, training: bool = False, **given: Any) -> str:
    candidates: list[Lowering] = [*KERNELS.values(), *NATIVE, reference_lowering(ops.attention)]
    bound = ops.attention.bind(
        tuple(
            torch.empty(shape, dtype=torch.bfloat16, device="meta")
            for shape in ((2, 32, t, 128), (2, 8, s, 128), (2, 8, s, 128))
        ),
        {"scale": 0.1, **given},
    )
    result = torch.empty(2, 32, t, 128, dtype=torch.bfloat16, device="meta")
    return choose(candidates, H100, bound, result, training).lowering.name


def test_which_lowering_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's kernel where it makes no mask of its own; these where the others would be large."""
    monkeypatch.undo()
    sinks, keep = torch.empty(32, device="meta"), torch.empty(4096, 4096, dtype=torch.bool, device="meta")
    assert chosen(4096, 4096) == chosen(4096, 4096, is_causal=True) == "sdpa"
    assert chosen(1, 8192) == chosen(4096, 4096, mask=keep, zero_masked_rows=True) == "sdpa"
    assert chosen(4096, 4096, is_causal=True, softcap=50.0) == "triton"
    assert chosen(4096, 4096, is_causal=True, sinks=sinks) == "triton"
    assert chosen(8192, 8192, low=-1023, high=0) == "triton"
    assert chosen(1, 32768, softcap=50.0) == chosen(1, 32768, low=31744) == "triton-divided"
    padding = torch.empty(2, 1, 1, 32768, dtype=torch.bool, device="meta")
    assert chosen(1, 32768, softcap=50.0, mask=padding) == "triton-stream-k"
    assert chosen(4096, 4096, softcap=50.0, mask=padding[..., :4096]) == "triton"
    assert chosen(4096, 4096, training=True, softcap=50.0) == "triton"


def test_tiles() -> None:
    for dtype in DTYPES:
        for head in (16, 64, 80, 128, 256):
            for dense in (False, True):
                tiles = [tile_for(rows, head, dtype, dense) for rows in (1, 16, 17, 33, 65, 4096)]
                assert all(tile.rows >= 16 and tile.keys >= 16 for tile in tiles)
                assert tiles[0].rows == tiles[1].rows == 16
    assert attention_tiles.row_tiles(ops.attention.bind((Q, K, K), {"scale": 1.0})) == 4.0
