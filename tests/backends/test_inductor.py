"""What the user sets for Inductor stands beside our own settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from effopt.backends.inductor import _InTurn


class Named(CustomGraphPass):
    def __init__(self, name: str | None, seen: list[str | None]) -> None:
        self.name, self.seen = name, seen

    def __call__(self, graph: Graph) -> None:
        self.seen.append(self.name)

    def uuid(self) -> Any:
        return self.name


@pytest.mark.parametrize("several", [False, True], ids=["one", "two"])
def test_passes_of_the_user_run_in_order(several: bool) -> None:
    """In the slot before lowering, where one of ours runs first; torch 2.11 takes a single pass there."""
    seen: list[str | None] = []
    passes = [Named(None, seen), Named("second", seen)]  # None: Inductor does not cache, so the passes run
    given = _InTurn(passes) if several else passes[0]
    x = torch.randn(4, 8)
    with torch.no_grad():
        options: Any = {"inductor": {"post_grad_custom_pre_pass": given}}
        run = torch.compile(lambda x: x.sin(), backend="effopt", options=options)
        torch.testing.assert_close(run(x), x.sin())
    assert seen == ([None, "second"] if several else [None])


def test_passes_in_turn_have_an_identity_if_each_has_one() -> None:
    seen: list[str | None] = []
    both = _InTurn([Named("a", seen), Named("b", seen)])
    both(Graph())
    assert seen == ["a", "b"]
    assert both.uuid() == ("a", "b")
    assert _InTurn([Named("b", seen), Named("a", seen)]).uuid() != both.uuid()
    assert _InTurn([Named("a", seen), Named(None, seen)]).uuid() is None
    assert _InTurn([Named("a", seen), lambda graph: None]).uuid() is None
