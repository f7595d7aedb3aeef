"""Rotary tables scaled and rebased: what transformers computes with such a configuration, in every graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effopt
from effopt.compile import record
from effopt.errors import PlanError
from effopt.passes.attention.scale_positions import rotated, turn
from effopt.passes.plan import Entry, PlannedSites, Section
from tests.passes.conftest import run_compiled

transformers = pytest.importorskip("transformers")
THETA, FACTOR, D = 1e4, 4.0, 8
SCALE, REBASE = "scale-positions{factor=4}", "rebase-positions{factor=4}"
LINEAR = {"rope_type": "linear", "factor": FACTOR, "rope_theta": THETA}
NTK = {"rope_type": "default", "rope_theta": THETA * FACTOR ** (D / (D - 2))}
IDS = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))


def llama(rope: dict[str, Any] | None = None, layers: int = 1) -> nn.Module:
    """Weights large enough for positions to show in the logits."""
    torch.manual_seed(0)
    made = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.3, attn_implementation="sdpa",
        rope_parameters=rope or {"rope_type": "default", "rope_theta": THETA},
    )  # fmt: skip
    return transformers.LlamaForCausalLM(made).eval()


@pytest.mark.parametrize(
    ("spec", "rope", "dynamic"), [(SCALE, LINEAR, None), (REBASE, NTK, None), (SCALE, LINEAR, True)]
)
def test_logits_of_transformers(spec: str, rope: dict[str, Any], dynamic: bool | None) -> None:
    with torch.no_grad():
        out, report = run_compiled(llama(layers=2), IDS, dynamic=dynamic, passes=spec)
        want, plain = llama(rope, 2)(IDS).logits, llama(layers=2)(IDS).logits
    torch.testing.assert_close(out.logits, want, rtol=1e-4, atol=1e-4)
    assert report.counts[spec.split("{")[0]] == 1, "one table serves all layers"
    assert (plain - want).abs().max() > 0.1


@pytest.mark.parametrize(
    ("spec", "rope", "cache"),
    [
        (SCALE, LINEAR, "static"),
        (REBASE, NTK, "dynamic"),
        pytest.param(SCALE, LINEAR, "dynamic", marks=pytest.mark.slow),
        pytest.param(REBASE, NTK, "static", marks=pytest.mark.slow),
    ],
)
def test_tokens_of_transformers(spec: str, rope: dict[str, Any], cache: str) -> None:
    """Prefill and decode are two graphs of one model."""
    torch._dynamo.reset()
    given: dict[str, Any] = {"cache_implementation": "static"} if cache == "static" else {}
    given |= {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "disable_compile": True}
    given |= {"attention_mask": torch.ones_like(IDS)}
    model = llama()
    plain = model.generate(IDS, **given)
    options = {"passes": spec, "lowering": "eager"}
    model.forward = torch.compile(model.forward, backend="effopt", options=options)
    with record() as report:
        got = model.generate(IDS, **given)
    want = llama(rope).generate(IDS, **given)
    assert got.tolist() == want.tolist()
    assert got.tolist() != plain.tolist()
    assert report.counts[spec.split("{")[0]] > 1


def test_one_plan_for_all_graphs() -> None:
    model = llama()
    site = Entry("model.rotary_emb", "rotary table of 4 angles", {"factor": 4.0})
    plan = effopt.Plan((Section("scale-positions", graphs=(PlannedSites((site,)),)),))
    plan = effopt.Plan.from_json(plan.to_json())
    torch._dynamo.reset()
    with torch.no_grad():
        run = torch.compile(model, backend="effopt", options={"plans": plan, "lowering": "eager"})
        got = run(IDS).logits
        torch.testing.assert_close(got, llama(LINEAR)(IDS).logits, rtol=1e-4, atol=1e-4)


def test_factor_one_changes_nothing() -> None:
    with torch.no_grad():
        out, report = run_compiled(llama(), IDS, passes="scale-positions{factor=1}")
        torch.testing.assert_close(out.logits, llama()(IDS).logits, rtol=1e-5, atol=1e-5)
    assert not report.counts["scale-positions"]
    assert "factor=1 changes nothing" in [r.reason for r in report.rejected]


def test_gradients_are_those_of_transformers() -> None:
    """Position interpolation is made for a little training."""
    model, want = llama(), llama(LINEAR)
    out, _ = run_compiled(model, IDS, passes=SCALE)
    out.logits.square().mean().backward()
    want(IDS).logits.square().mean().backward()
    for (name, one), other in zip(model.named_parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: n + m)


class TwoGraphs(nn.Module):
    """Makes its table itself, or is given one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor, frequencies: Tensor, table: Tensor | None = None) -> Tensor:
        x = x @ self.weight
        return rotated(x, frequencies) if table is None else turn(x, table.cos(), table.sin())


def test_graphs_that_would_differ_are_an_error() -> None:
    torch._dynamo.reset()
    model, x, frequencies = TwoGraphs(), torch.randn(1, 2, 5, 8), torch.rand(4)
    run = torch.compile(model, backend="effopt", options={"passes": SCALE, "lowering": "eager"})
    with torch.no_grad():
        run(x, frequencies)
        with pytest.raises(Exception, match="would mix two models") as raised:
            run(x, frequencies, torch.randn(5, 8))
    assert PlanError.__name__ in repr(raised.value) or isinstance(raised.value, PlanError)


@pytest.mark.parametrize(
    "spelled",
    [
        lambda at, f: (f[None, :, None].expand(1, -1, 1) @ at[None, None].float()).mT,
        lambda at, f: at[:, None].float() * f,
        lambda at, f: torch.outer(at.float(), f),
        lambda at, f: torch.einsum("i,j->ij", at.float(), f),
        lambda at, f: torch.arange(64).float()[:, None].mul(f)[at],
    ],
)
@pytest.mark.parametrize("spec", [SCALE, REBASE])
def test_spellings_of_a_table(spelled: Any, spec: str) -> None:
    def run(x: Tensor, frequencies: Tensor) -> Tensor:
        angle = spelled(torch.arange(x.shape[2]), frequencies)
        angle = torch.cat((angle, angle), -1)
        return turn(x, angle.cos() * 1.5, angle.sin() * 1.5)

    x, frequencies = torch.randn(1, 2, 5, 8), 100.0 ** (-torch.arange(4) / 4)
    with torch.no_grad():
        out, report = run_compiled(run, x, frequencies, passes=spec)
    assert report.counts[spec.split("{")[0]] == 1, [r.reason for r in report.rejected]
    slower = FACTOR if spec == SCALE else FACTOR ** (torch.arange(4) / 3)
    torch.testing.assert_close(out, run(x, frequencies / slower), rtol=1e-5, atol=1e-5)


def test_a_buffer_is_refused() -> None:
    """GPT-J looks its tables up in a buffer that was made when it was built."""
    config = transformers.GPTJConfig(
        vocab_size=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=8, n_positions=64, resid_pdrop=0.0
    )
    model = transformers.GPTJForCausalLM(config).eval()
    with torch.no_grad():
        out, report = run_compiled(model, IDS, passes=SCALE)
        torch.testing.assert_close(out.logits, model(IDS).logits, rtol=1e-4, atol=1e-4)
    reasons = [r.reason for r in report.rejected if r.pass_name == "scale-positions"]
    assert reasons
    assert "scale-positions" not in report.counts


def test_positions_are_whole_numbers() -> None:
    def run(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
        angle = positions[:, None] * frequencies
        angle = torch.cat((angle, angle), -1)
        return turn(x, angle.cos(), angle.sin())

    with torch.no_grad():
        _, report = run_compiled(run, torch.randn(1, 2, 5, 8), torch.rand(5), torch.rand(4), passes=SCALE)
    assert any("none, or both, are whole numbers" in r.reason for r in report.rejected)
