"""Mixers that are no attention that an op computes: each says so, and what only resembles them does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from effopt.compile import record
from tests.passes.conftest import reasons_of, run_compiled

LINEAR, CHUNKED, SOFTMAX = (
    "recognize-linear-attention",
    "recognize-chunked-attention",
    "recognize-attention",
)


def inputs(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(2, 3, 7, n, dtype=dtype) for n in (4, 4, 5)]


def polynomial(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A Taylor series of exp, as Based has it."""
    scores = q @ k.mT * 0.5
    weights = (1 + scores + 0.5 * scores**2).tril()
    return (weights @ v) / weights.sum(-1, keepdim=True)


def squared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As gated attention units have it."""
    place = torch.arange(q.shape[2])
    weights = F.relu(q @ k.mT / q.shape[2]).square().masked_fill(place > place[:, None], 0.0)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


def unmasked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two layers with a matrix of each head."""
    return F.relu(q @ k.mT) @ v


def softened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    place = torch.arange(q.shape[2])
    return (q @ k.mT).masked_fill(place > place[:, None], -torch.inf).softmax(-1) @ v


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v


@pytest.mark.parametrize(
    ("attend", "told"),
    [
        (polynomial, "go through aten.pow.Tensor_Scalar, aten.add.Tensor"),
        (squared, "go through aten.relu.default, aten.square.default"),
        (unmasked, ""),
        (softened, ""),
        (plain, ""),
    ],
)
def test_weights_that_are_bent(attend: Callable[..., Tensor], told: str) -> None:
    given = inputs()
    with torch.no_grad():
        out, report = run_compiled(attend, *given)
        torch.testing.assert_close(out, attend(*given), rtol=1e-5, atol=1e-5)
    found = reasons_of(report, LINEAR)
    words = set(told.removeprefix("go through ").split(", ")) if told else set()
    assert all(word in found for word in words), found
    assert ("go through" in found) == bool(told), found


def dropped(q: Tensor, k: Tensor, v: Tensor, training: bool) -> Tensor:
    return F.dropout((q @ k.mT * 0.5).tril(), 0.5, training) @ v


def test_dropout_of_weights_is_nothing_in_inference() -> None:
    given = [x.requires_grad_() for x in inputs(torch.float64)]
    got, report = run_compiled(lambda *x: dropped(*x, training=False), *given, verify="off")
    want = dropped(*given, training=False)
    assert report.ops["linear_attention"] == 1
    assert (got - want).abs().max() <= 1e-13 * want.abs().max()
    found = [torch.autograd.grad(y.cos().sum(), given) for y in (got, want)]
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= 1e-13 * other.abs().max()


def test_dropout_of_weights_is_told_in_training() -> None:
    given = inputs()
    _, report = run_compiled(lambda *x: dropped(*x, training=True), *given)
    assert not report.ops["linear_attention"]
    assert "dropout is applied to the weights in training" in reasons_of(report, LINEAR)


def solved(k: Tensor, v: Tensor, matrix: Any, **options: Any) -> Tensor:
    return torch.linalg.solve_triangular(matrix(k), v, **{"upper": False, "unitriangular": True, **options})


@pytest.mark.parametrize(
    ("matrix", "options", "is_told"),
    [
        (lambda k: (k @ k.mT).tril() * 0.1, {}, True),
        (lambda k: (k @ k.mT).tril() + 5.0, {"unitriangular": False}, False),
        (lambda k: k[..., :1].expand(2, 3, 7, 7) * 0.1, {}, False),
    ],
)
def test_a_delta_rule_in_chunks(matrix: Any, options: dict[str, Any], is_told: bool) -> None:
    """Of a triangle of products of keys with ones on its diagonal; not of any triangular system."""
    _, k, v = inputs()
    with torch.no_grad():
        out, report = run_compiled(lambda k, v: solved(k, v, matrix, **options), k, v)
        torch.testing.assert_close(out, solved(k, v, matrix, **options))
    assert ("a delta rule in chunks" in reasons_of(report, CHUNKED)) == is_told


def test_scores_of_another_graph_say_where_they_come_from() -> None:
    scores, v = torch.randn(2, 3, 7, 7), torch.randn(2, 3, 7, 5)
    _, report = run_compiled(lambda s, b, v: (s + b).softmax(-1) @ v, scores, torch.randn(7), v)
    found = reasons_of(report, SOFTMAX)
    assert "an input of this graph, and query @ key^T is not in it" in found
    assert "TORCH_LOGS=graph_breaks" in found


def test_a_recurrence_of_elements_is_told_before_its_gates_are_taken() -> None:
    """`sigmoid(f) * state` alone is a gated unit."""

    def pooled(f: Tensor, z: Tensor, o: Tensor) -> Tensor:
        state, out = torch.zeros(2, 4), []
        for t in range(5):
            gate = f[:, t].sigmoid()
            state = gate * state + (1 - gate) * z[:, t].tanh()
            out.append(o[:, t].sigmoid() * state)
        return torch.stack(out, 1)

    with torch.no_grad():
        _, report = run_compiled(pooled, *(torch.randn(2, 5, 4) for _ in range(3)))
    assert "its states are collected as they are" in reasons_of(report, "recognize-recurrent-attention")


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True])
def test_deberta(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code calls `item()` between scores and softmax; with that in the graph it is recognised."""
    from transformers import DebertaConfig, DebertaModel

    monkeypatch.setattr(torch._dynamo.config, "capture_scalar_outputs", whole)
    config = DebertaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        relative_attention=True, pos_att_type=["c2p", "p2c"], type_vocab_size=0,
    )  # fmt: skip
    model, tokens = DebertaModel(config).eval(), torch.randint(0, 64, (1, 12))
    torch._dynamo.reset()
    with torch.no_grad(), record() as report:
        out = torch.compile(model, backend="effopt", options={"lowering": "eager"})(tokens)
        torch.testing.assert_close(out[0], model(tokens)[0], rtol=1e-5, atol=1e-5)
    assert report.counts[SOFTMAX] == whole
    assert ("capture_scalar_outputs = True" in reasons_of(report, SOFTMAX)) == (not whole)
