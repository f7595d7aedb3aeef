"""One step of a recurrence over a given state, as in decoding: told, and its look-alikes are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.passes.conftest import reasons_of, run_compiled

NAME = "recognize-recurrent-attention"
B, H, D, E = 2, 3, 4, 5


def inputs() -> list[Tensor]:
    sizes = ((B, H, D), (B, H, D), (B, H, E), (B, H, D), (B, H, D, E))
    return [torch.randn(size) for size in sizes]


def rows(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Any:
    s = s * g.sigmoid().unsqueeze(-1) + k.unsqueeze(-1) @ v.unsqueeze(-2)
    return (q.unsqueeze(-2) @ s).squeeze(-2), s


def products(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Any:
    s = 0.9 * s + k.unsqueeze(-1) * v.unsqueeze(-2)
    return (q.unsqueeze(-1) * s).sum(-2), s


def written_back(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Any:
    """As caches are: the given tensor is written, and the value is scaled by a step length."""
    s.copy_(s * g[..., :1, None].exp() + g.exp()[..., None] * v[:, :, None] * k[..., None])
    return torch.einsum("bhd,bhde->bhe", q, s)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Any:
    s = s * g[..., :1, None].sigmoid()
    held = (s * k.unsqueeze(-1)).sum(-2)
    s = s + k.unsqueeze(-1) * (v - held).unsqueeze(-2)
    return (q.unsqueeze(-1) * s).sum(-2), s


def not_decayed(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Any:
    """A gradient step, or a weight with an adapter of rank 1."""
    s = s + k.unsqueeze(-1) @ v.unsqueeze(-2)
    return q.unsqueeze(-2) @ s, s


def not_returned(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Any:
    """A weight that is scaled, with an adapter of rank 1."""
    return q.unsqueeze(-2) @ (s * 0.9 + k.unsqueeze(-1) @ v.unsqueeze(-2))


def not_read(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Any:
    """A running average of an outer product, as optimizers keep."""
    return 0.9 * s + 0.1 * (k.unsqueeze(-1) @ v.unsqueeze(-2))


def no_product(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Any:
    s = 0.9 * s + 0.1 * s.square()
    return q.unsqueeze(-2) @ s, s


TOLD = {"rows": rows, "products": products, "written back": written_back}
SILENT = {f.__name__: f for f in (not_decayed, not_returned, not_read, no_product)}


def reasons(step: Any) -> str:
    """Why one step is left alone; its values are those of eager."""
    given = inputs()
    with torch.no_grad():
        want = step(*(x.clone() for x in given))
        got, report = run_compiled(step, *given, pipeline=NAME)
    torch.testing.assert_close(got, want)
    assert not report.ops["linear_attention"]
    assert not report.faults
    return reasons_of(report, NAME)


@pytest.mark.parametrize("name", TOLD)
def test_a_step_says_that_it_is_no_loop(name: str) -> None:
    found = reasons(TOLD[name])
    assert found.startswith("one step of linear attention over a given state"), found
    assert ";" not in found


def test_a_step_of_a_delta_rule_is_none_of_linear_attention() -> None:
    found = reasons(delta_rule)
    assert (
        found == "one step of a delta rule: what it adds depends on the given state, and no op computes that"
    )


@pytest.mark.parametrize("name", SILENT)
def test_look_alikes_are_not_told(name: str) -> None:
    assert not reasons(SILENT[name])
