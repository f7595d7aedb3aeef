"""Buffers that are masks: read while they hold what they held, and never afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPTNeoConfig, GPTNeoForCausalLM

from effopt.compile import record
from effopt.graph import held_masks
from effopt.graph.held_masks import band_of

N = 12


class Attending(nn.Module):
    """As hand-written models spell causal attention."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        self.project = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.mask, Tensor)
        q, k, v = self.project(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        t = x.shape[1]
        scores = (q @ k.mT) * 0.5
        scores = scores.masked_fill(self.mask[:, :, :t, :t] == 0, float("-inf"))
        out: Tensor = scores.softmax(-1) @ v
        return out


def triangle(n: int = N) -> Tensor:
    return torch.ones(n, n).tril().view(1, 1, n, n)


def compiled(model: nn.Module, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="effopt", options={"lowering": "eager", **options})


def assert_same(got: Any, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(got(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dynamic", [None, True])
def test_buffer_is_proved_causal(dynamic: bool | None) -> None:
    model, x = Attending(triangle()), torch.randn(2, 7, 8)
    torch._dynamo.reset()
    options = {"lowering": "eager"}
    with record() as report:
        got = torch.compile(model, backend="effopt", dynamic=dynamic, options=options)
        assert_same(got, model, x)
    assert report.counts["spell-mask-buffers"] == 1
    assert report.counts["prove-causal"] == 1
    assert any("guarded" in a.note for a in report.applied)


def test_written_buffer_is_read_again() -> None:
    model, x = Attending(triangle()), torch.randn(2, 7, 8)
    got = compiled(model)
    assert_same(got, model, x)
    with record() as report, torch.no_grad():
        model.mask[..., 5, 2] = 0  # type: ignore[index]
        assert_same(got, model, x)
        assert_same(got, model, x)
    assert len(report.graphs) == 1  # compiled once more, without the fact
    assert report.counts["spell-mask-buffers"] == 0
    with record() as report, torch.no_grad():
        model.mask.copy_(triangle())  # type: ignore[operator, union-attr]
        assert_same(got, model, x)
    assert not report.graphs


def test_replaced_buffer_is_read_again() -> None:
    model, x = Attending(triangle()), torch.randn(2, 7, 8)
    got = compiled(model)
    assert_same(got, model, x)
    model.mask = triangle()
    assert_same(got, model, x)
    with torch.no_grad():
        before = model(x)
        model.mask = triangle().triu(-2)
        wanted = model(x)
        assert not torch.allclose(wanted, before)
        torch.testing.assert_close(got(x), wanted, rtol=1e-5, atol=1e-5)


def test_other_data_of_the_same_buffer() -> None:
    model, x = Attending(triangle()), torch.randn(2, 7, 8)
    got = compiled(model)
    assert_same(got, model, x)
    model.mask.data = triangle().triu(-2)  # type: ignore[union-attr]
    assert_same(got, model, x)


def test_two_modules_of_one_class() -> None:
    """Dynamo may serve both with one code: each has a mask of its own."""
    models = [Attending(triangle()), Attending(triangle().triu(-2))]
    torch._dynamo.reset()
    call = torch.compile(lambda m, x: m(x), backend="effopt", options={"lowering": "eager"})
    x = torch.randn(2, 7, 8)
    for model in (*models, *models):
        with torch.no_grad():
            torch.testing.assert_close(call(model, x), model(x), rtol=1e-5, atol=1e-5)


def test_buffer_that_the_model_writes_stays() -> None:
    class Writing(Attending):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            self.mask.mul_(1.0)  # type: ignore[union-attr, operator]
            return out

    model, x = Writing(triangle()), torch.randn(2, 7, 8)
    with record() as report:
        assert_same(compiled(model), model, x)
    assert report.counts["spell-mask-buffers"] == 0


def assert_left_alone(model: nn.Module, x: Tensor) -> None:
    """Compiled, right, and without the pass."""
    with record() as report:
        got, wanted = compiled(model)(x), model(x)
    torch.testing.assert_close(got, wanted)
    assert report.counts["spell-mask-buffers"] == 0
    assert not report.faults


def test_buffer_that_the_model_returns_a_view_of_stays() -> None:
    class Returning(Attending):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), self.mask[0, 0, :3, :3]  # type: ignore[index]

    assert_left_alone(Returning(triangle()).eval().requires_grad_(False), torch.randn(2, 7, 8))


def test_buffer_that_wants_a_gradient_keeps_it() -> None:
    class Weighing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weigh", torch.ones(8, 8).tril().requires_grad_())

        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT * self.weigh).sum()  # type: ignore[no-any-return]

    model, x = Weighing(), torch.randn(8, 8)
    compiled(model)(x).backward()
    torch.testing.assert_close(model.weigh.grad, x @ x.mT)


@pytest.mark.parametrize(
    "use",
    [
        lambda x, mask, weight: x @ mask,
        lambda x, mask, weight: x @ (mask * weight),
        lambda x, mask, weight: mask[:, :3].sum() + x,
    ],
    ids=["matrix", "masked weight", "sum"],
)
def test_buffer_that_masks_nothing_stays(use: Any) -> None:
    class Using(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(8, 8).tril())
            self.weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)

        def forward(self, x: Tensor) -> Any:
            return use(x, self.mask, self.weight)

    assert_left_alone(Using(), torch.randn(4, 8))


def test_fuel_counts_it() -> None:
    model, x = Attending(triangle()), torch.randn(2, 7, 8)
    with record() as report:
        assert_same(compiled(model, fuel=0), model, x)
    assert report.counts["spell-mask-buffers"] == 0
    assert any("out of fuel" in r.reason for r in report.rejected if r.pass_name == "spell-mask-buffers")


def test_a_buffer_is_compared_once_after_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the answer is."""
    looked: list[Any] = []
    original = held_masks.Band.holds
    monkeypatch.setattr(held_masks.Band, "holds", lambda band, x: looked.append(x) or original(band, x))
    model, x = Attending(triangle()), torch.randn(2, 7, 8)
    got = compiled(model)
    for change in (lambda m: None, lambda m: m[..., 5, 2].zero_(), lambda m: m.copy_(triangle())):
        with torch.no_grad():
            change(model.mask)
            got(x)
            looked.clear()
            for _ in range(5):
                assert_same(got, model, x)
        assert not looked


def test_input_that_happens_to_be_a_triangle_stays() -> None:
    def attend(q: Tensor, keep: Tensor) -> Tensor:
        return (q @ q.mT).masked_fill(~keep, float("-inf")).softmax(-1) @ q

    torch._dynamo.reset()
    q, keep = torch.randn(2, 2, 7, 8), torch.ones(7, 7, dtype=torch.bool).tril()
    with record() as report:
        torch.compile(attend, backend="effopt", options={"lowering": "eager"})(q, keep)
    assert report.counts["spell-mask-buffers"] == 0


@pytest.mark.parametrize("training", [False, True])
def test_gpt_neo(training: bool) -> None:
    """Global and local layers, each with a buffer of its own."""
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 50, "window_size": 4}
    config = GPTNeoConfig(
        attention_types=[[["global", "local"], 1]], max_position_embeddings=32, attn_implementation="eager",
        attention_dropout=0.0, embed_dropout=0.0, resid_dropout=0.0, **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPTNeoForCausalLM(config).train(training)
    tokens = torch.randint(0, 50, (2, 11))
    with record() as report, torch.set_grad_enabled(training):
        out = compiled(model)(tokens, use_cache=False).logits
    torch.testing.assert_close(out, model(tokens, use_cache=False).logits, rtol=1e-4, atol=1e-5)
    assert report.ops["attention"] == 2
    assert report.counts["spell-mask-buffers"] == 2
    found = [a.note for a in report.applied if a.pass_name == "recover-mask-structure"]
    if not training:  # in training a bias that may hide a row stays
        assert any("-3 .. 0" in note for note in found)


@pytest.mark.parametrize(
    ("mask", "bounds"),
    [
        (torch.ones(5, 5).tril(), (None, 0, 1.0, 0.0)),
        (torch.ones(5, 5, dtype=torch.bool).triu(1), (None, 0, False, True)),
        (torch.ones(4, 6).tril(1).triu(-2), (-2, 1, 1.0, 0.0)),
        (torch.full((5, 5), float("-inf")).triu(1), (None, 0, 0.0, float("-inf"))),
        (torch.ones(5, 5).triu(), (0, None, 1.0, 0.0)),
        (torch.eye(4), (0, 0, 1.0, 0.0)),
        (torch.ones(5, 5), None),
        (torch.ones(5, 5).tril().flip(0), None),
        (torch.tensor([[1.0, 0.0], [2.0, 1.0]]), None),
        (torch.full((3, 3), float("nan")).tril(), None),
        (torch.ones(2, 5, 5).tril(), None),
        (torch.ones(5), None),
        (torch.ones(0, 0), None),
    ],
)
def test_band_of(mask: Tensor, bounds: Any) -> None:
    band = band_of(mask)
    if bounds is None:
        assert band is None
    else:
        assert band is not None
        assert (band.low, band.high, band.inside, band.outside) == bounds
        assert band.holds(mask)
        assert not band.holds(mask.flip(-1))
