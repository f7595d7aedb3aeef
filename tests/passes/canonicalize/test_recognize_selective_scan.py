"""Loops of state-space models, as `transformers` writes Mamba, FalconMamba and Jamba; and look-alikes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import effopt

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "pad_token_id": 0}
MAMBA = SMALL | {"state_size": 4, "time_step_rank": 2, "use_associative_scan": False}
NAME = "recognize-selective-scan"


@pytest.fixture(autouse=True)
def without_warnings() -> Iterator[None]:
    """Dynamo warns of an `lru_cache` that `transformers` looks through in each mixer."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
        yield


def mamba(**more: Any) -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(**MAMBA | more))


def falcon() -> Any:
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    torch.manual_seed(0)
    return FalconMambaForCausalLM(FalconMambaConfig(**MAMBA))


def jamba() -> Any:
    from transformers import JambaConfig, JambaForCausalLM

    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24, "num_experts": 1}
    scans = {"mamba_d_state": 4, "mamba_dt_rank": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
    torch.manual_seed(0)
    config = JambaConfig(**SMALL | heads | scans, use_associative_scan=False, use_mamba_kernels=False)
    return JambaForCausalLM(config)


def ids(t: int) -> Tensor:
    return torch.randint(1, 50, (2, t), generator=torch.Generator().manual_seed(0))


def run(call: Callable[[], Any], **options: Any) -> tuple[Any, Any]:
    torch._dynamo.reset()
    with effopt.record() as report:
        return torch.compile(call, backend="effopt", options=options)(), report


@pytest.mark.parametrize(("build", "scans"), [(mamba, 2), (falcon, 2), (jamba, 1)])
def test_prefill_of_models(build: Callable[[], Any], scans: int) -> None:
    model = build().eval()
    with torch.no_grad():
        want = model(ids(12), use_cache=False).logits
        got, report = run(lambda: model(ids(12), use_cache=False).logits, lowering="eager")
    assert report.ops["selective_scan"] == scans
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()


def test_prefill_with_a_cache_and_a_step_of_decoding() -> None:
    """The last state goes into the cache. One step of decoding is no loop, and is left alone."""
    model, t = mamba().eval(), 9
    with torch.no_grad():
        want = model(ids(t), use_cache=True)
        got, report = run(lambda: model(ids(t), use_cache=True))
        assert report.ops["selective_scan"] == 2
        states = [[x.recurrent_states for x in r.cache_params.layers] for r in (want, got)]
        torch.testing.assert_close(states[1], states[0], rtol=2e-5, atol=1e-5)
        token = ids(t)[:, :1]
        expected = model(token, cache_params=want.cache_params).logits
        found, report = run(lambda: model(token, cache_params=got.cache_params).logits)
    assert report.ops["selective_scan"] == 0
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize(("layers", "lowering"), [(1, "auto"), (2, "eager")])
def test_gradients_of_a_model(layers: int, lowering: str) -> None:
    """Inductor has one layer: of two, outlined, torch 2.13 fails in its backward, with this pass or not."""
    model = mamba(num_hidden_layers=layers).train()
    weights = list(model.parameters())
    want = torch.autograd.grad(model(ids(16), use_cache=False).logits.square().sum(), weights)
    logits, report = run(lambda: model(ids(16), use_cache=False).logits, lowering=lowering)
    got = torch.autograd.grad(logits.square().sum(), weights)
    assert report.ops["selective_scan"] == layers
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-7


def test_bfloat16_keeps_its_state_in_float32() -> None:
    model = mamba().eval()
    with torch.no_grad():
        exact = model(ids(12), use_cache=False).logits
        model.bfloat16()
        own = model(ids(12), use_cache=False).logits
        got, report = run(lambda: model(ids(12), use_cache=False).logits, lowering="eager")
    assert report.ops["selective_scan"] == 2
    assert (got - exact).abs().max() <= 1.5 * (own - exact).abs().max() + 1e-2 * exact.abs().max()


def test_the_graph_no_longer_grows_with_the_sequence() -> None:
    """Calls that are handed to the backend: at 4 steps as at 16."""

    def nodes(t: int, disable: tuple[str, ...]) -> int:
        model = mamba(num_hidden_layers=1).eval()
        with torch.no_grad():
            _, report = run(lambda: model(ids(t), use_cache=False).logits, lowering="eager", disable=disable)
        (graph,) = report.graphs
        return graph.nodes_after

    assert nodes(4, ()) == nodes(16, ())
    assert nodes(16, (NAME,)) - nodes(4, (NAME,)) == 12 * 8


def minimal(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """By `einsum`, time second: u and delta `[b, t, d]`, b and c `[b, t, n]`."""
    decay = torch.exp(torch.einsum("bld,dn->bldn", delta, a))
    added = torch.einsum("bld,bln,bld->bldn", delta, b, u)
    h, ys = torch.zeros(u.shape[0], *a.shape), []
    for i in range(u.shape[1]):
        h = decay[:, i] * h + added[:, i]
        ys.append(torch.einsum("bdn,bn->bd", h, c[:, i, :]))
    return torch.stack(ys, 1)


def minimal_inputs(t: int = 6) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    sequence, projections = torch.randn(2, t, 3), [torch.randn(2, t, 4) for _ in range(2)]
    return sequence, torch.rand(2, t, 3), -torch.rand(3, 4), *projections


def test_a_model_in_einsum() -> None:
    given = minimal_inputs()
    got, report = run(lambda: minimal(*given), lowering="eager")
    assert report.ops["selective_scan"] == 1
    torch.testing.assert_close(got, minimal(*given), rtol=2e-5, atol=1e-5)


def test_two_scans_one_after_the_other() -> None:
    given = minimal_inputs()
    twice = lambda: minimal(minimal(*given), *given[1:])  # noqa: E731
    got, report = run(twice, lowering="eager")
    assert report.ops["selective_scan"] == 2
    torch.testing.assert_close(got, twice(), rtol=2e-5, atol=1e-5)


def test_a_rate_that_differs_between_steps_is_refused() -> None:
    u, delta, _, b, c = minimal_inputs()

    def loop(rates: Tensor) -> Tensor:
        h, ys = torch.zeros(2, 3, 4), []
        for i in range(6):
            h = (
                torch.exp(delta[:, i, :, None] * rates[i]) * h
                + delta[:, i, :, None] * u[:, i, :, None] * b[:, i, None]
            )
            ys.append((h * c[:, i, None]).sum(-1))
        return torch.stack(ys, 1)

    _, report = run(lambda: loop(-torch.rand(6, 3, 4)), lowering="eager")
    assert report.ops["selective_scan"] == 0
    (why,) = [r.reason for r in report.rejected if r.pass_name == NAME]
    assert "is no product" in why


Read = Callable[[Tensor, Tensor, int], Tensor]


def looped(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, read: Read) -> tuple[Tensor, Tensor]:
    """Read-outs and the last state. u and delta `[b, d, t]`, b and c `[b, n, t]`."""
    h, ys = torch.zeros(u.shape[0], *a.shape), []
    for t in range(u.shape[2]):
        length = delta[:, :, t, None]
        h = torch.exp(length * a) * h + length * u[:, :, t, None] * b[:, None, :, t]
        ys.append(read(h, c, t))
    return torch.stack(ys, -1), h


def weighted(h: Tensor, c: Tensor, t: int) -> Tensor:
    return (h * c[:, None, :, t]).sum(-1)


def inputs(**other: tuple[int, ...]) -> list[Tensor]:
    """Of two rows, three channels, a state of five and four steps; `other` sizes of some of them."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"u": (2, 3, 4), "delta": (2, 3, 4), "a": (3, 5), "b": (2, 5, 4), "c": (2, 5, 4)} | other
    made = {name: torch.rand(*size, generator=generator) for name, size in sizes.items()}
    return [made["u"] * 20, made["delta"], -made["a"], made["b"] - 0.5, made["c"] - 0.5]


def product(h: Tensor, c: Tensor, t: int) -> Tensor:
    return (h @ c[:, :, t].unsqueeze(-1))[:, :, 0]


def test_numbers_where_a_loop_has_tensors_hide_no_loop() -> None:
    """A polynomial by Horner has the form of a loop, and so has one that adds a number."""

    def both(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        polynomial = ((0.1 * u + 0.2) * u + 0.3) * u + 0.4
        h, ys = torch.zeros(2, 3, 5), []
        for t in range(4):
            h = h * torch.exp(delta[:, :, t, None] * a) + 0.3
            ys.append(weighted(h, c, t))
        return looped(u, delta, a, b, c, weighted)[0], polynomial, torch.stack(ys, -1)

    given = inputs()
    with torch.no_grad():
        got, report = run(lambda: both(*given), lowering="eager", pipeline=NAME)
    assert report.ops["selective_scan"] == 1
    assert not report.faults
    assert [r.reason for r in report.rejected] == ["0.3 by () is no product"]
    torch.testing.assert_close(got, both(*given), rtol=2e-5, atol=2e-5)


def test_polynomials_beside_a_model() -> None:
    model, given = mamba(num_hidden_layers=1).eval(), torch.randn(2, 8)
    both = lambda: (model(ids(6), use_cache=False).logits, ((0.1 * given + 0.2) * given + 0.3) * given + 0.4)  # noqa: E731
    with torch.no_grad():
        (got, _), report = run(both, lowering="eager")
        assert report.ops["selective_scan"] == 1
        assert not report.faults
        assert (got - both()[0]).abs().max() <= 2e-5 * got.abs().max()


def test_what_reads_states_may_be_made_after_the_last_of_them() -> None:
    """The last state is read before `c` exists, and the scan gives both."""

    def loop(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        h, states = torch.zeros(2, 3, 5), []
        for t in range(4):
            length = delta[:, :, t, None]
            h = torch.exp(length * a) * h + length * u[:, :, t, None] * b[:, None, :, t]
            states.append(h)
        early, late = h.cos(), c.sin()
        return early, torch.stack([weighted(state, late, t) for t, state in enumerate(states)], -1)

    given = inputs()
    with torch.no_grad():
        got, report = run(lambda: loop(*given), lowering="eager", pipeline=NAME)
    assert report.ops["selective_scan"] == 1
    torch.testing.assert_close(got, loop(*given), rtol=2e-5, atol=2e-5)


def test_a_loop_that_reads_what_a_later_one_gives() -> None:
    """The states of the first are read out with the output of the second, which is replaced too."""

    def both(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        h, states = torch.zeros(2, 5, 5), []
        for t in range(4):
            length = delta[:, :, t, None]
            h = torch.exp(length * a) * h + length * u[:, :, t, None] * b[:, None, :, t]
            states.append(h)
        c = looped(u, delta, a, b, c, product)[0]
        return torch.stack([product(state, c, t) for t, state in enumerate(states)], -1)

    given = inputs(u=(2, 5, 4), delta=(2, 5, 4), a=(5, 5))
    with torch.no_grad():
        got, report = run(lambda: both(*given), lowering="eager", pipeline=NAME)
    assert report.ops["selective_scan"] == 2
    torch.testing.assert_close(got, both(*given), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("as_memory", [False, True])
def test_results_keep_their_layout(as_memory: bool) -> None:
    """Written into a tensor whose axes lie in another order."""

    def loop(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        h, out = torch.zeros(u.shape[0], *a.shape), torch.empty_like(u.mT.contiguous().mT)
        for t in range(u.shape[2]):
            length = delta[:, :, t, None]
            h = torch.exp(length * a) * h + length * u[:, :, t, None] * b[:, None, :, t]
            out[:, :, t] = weighted(h, c, t)
        return torch.as_strided(out, (out.numel(),), (1,)) if as_memory else out

    with torch.no_grad():
        got, report = run(lambda: loop(*inputs()), lowering="eager", pipeline=NAME)
    assert report.ops["selective_scan"] == 1
    want = loop(*inputs())
    assert got.stride() == want.stride()
    torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
