"""Operations and bytes of graphs whose costs can be worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F

from effopt.graph.analyses.liveness import liveness
from effopt.graph.analyses.roofline import roofline
from effopt.graph.capture import capture
from effopt.graph.ops import OPS

OPS_BY_NAME = {op.name: op for op in OPS}


def captured(function: Callable[..., Tensor], *inputs: Tensor, dynamic: bool = False) -> GraphModule:
    found: list[GraphModule] = []

    def backend(module: GraphModule, example: list[Tensor]) -> object:
        found.append(capture(module, example).module)
        return module.forward

    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=dynamic)(*inputs)
    return found[0]


B, H, T, S, D = 2, 3, 5, 7, 8
Q, K, V = torch.randn(B, H, T, D), torch.randn(B, H, S, D), torch.randn(B, H, S, D)


@pytest.mark.parametrize(
    ("function", "inputs", "flops"),
    [
        (lambda x, w: F.linear(x, w), (torch.randn(3, 4), torch.randn(6, 4)), 2 * 3 * 4 * 6),
        (lambda a, b: a @ b, (torch.randn(2, 3, 4), torch.randn(2, 4, 5)), 2 * 2 * 3 * 4 * 5),
        (lambda a, b: torch.bmm(a, b), (torch.randn(2, 3, 4), torch.randn(2, 4, 5)), 2 * 2 * 3 * 4 * 5),
        (
            lambda b, x, y: torch.addmm(b, x, y),
            (torch.randn(5), torch.randn(3, 4), torch.randn(4, 5)),
            2 * 60,
        ),
        (lambda a, b: torch.einsum("bhtd,bhsd->bhts", a, b), (Q, K), 2 * B * H * T * S * D),
        (
            lambda x, w: F.conv2d(x, w, padding=1),
            (torch.randn(1, 3, 6, 6), torch.randn(4, 3, 3, 3)),
            2 * 4 * 36 * 27,
        ),
        (
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
            (Q, K, V),
            B * H * T * S * (2 * D + 5 + 2 * D),
        ),
        (lambda x: x.exp() + 1, (torch.randn(10),), 20),
        (lambda x: x.transpose(0, 1).unsqueeze(0).expand(4, 3, 2), (torch.randn(2, 3),), 0),
        (lambda x: torch.cat((x, x)), (torch.randn(2, 3),), 0),
        (lambda x: F.dropout(x, 0.5, False), (torch.randn(2, 3),), 0),
    ],
    ids=[
        "linear",
        "matmul",
        "bmm",
        "addmm",
        "einsum",
        "conv2d",
        "sdpa",
        "elementwise",
        "views",
        "cat",
        "off",
    ],
)
def test_flops(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], flops: float) -> None:
    torch._dynamo.reset()
    assert roofline(captured(function, *inputs).graph, OPS_BY_NAME).flops == flops


def test_bytes_are_operands_and_results_and_views_are_free() -> None:
    graph = captured(
        lambda x, y: (x.transpose(0, 1) + y.expand(4, 8)).reshape(-1), torch.randn(8, 4), torch.randn(8)
    )
    # x read, the 8 distinct elements of y read, the sum written; the reshape of a fresh sum is a view only
    # if that is contiguous, and the sum has the strides of x.
    assert roofline(graph.graph, OPS_BY_NAME).by_op["add"].bytes_moved == 4 * (32 + 8 + 32)


def test_symbolic_sizes_count_at_their_hints_and_are_not_specialised() -> None:
    graph = captured(lambda x, w: F.linear(x, w), torch.randn(6, 4), torch.randn(5, 4), dynamic=True)
    (placeholder, *_) = [
        n for n in graph.graph.find_nodes(op="placeholder") if isinstance(n.meta["val"], Tensor)
    ]
    assert roofline(graph.graph, OPS_BY_NAME).flops == 2 * 6 * 4 * 5
    assert isinstance(placeholder.meta["val"].shape[0], torch.SymInt)


def test_liveness_of_a_chain_is_two_values_and_views_keep_their_base() -> None:
    chain = liveness(captured(lambda x: x.exp().sin().cos().tanh(), torch.randn(100)).graph)
    assert chain.peak_bytes == 800
    assert chain.input_bytes == 400

    def held(x: Tensor) -> Tensor:
        view = x.exp().view(10, 10)[2:]
        other = x.sin().cos()
        return view.sum() + other.sum()

    # exp stays for its view while sin and cos are both there.
    assert liveness(captured(held, torch.randn(100)).graph).peak_bytes >= 1200


def test_liveness_without_values() -> None:
    empty = torch.fx.Graph()
    empty.output(())
    assert liveness(empty).peak_bytes == 0
    assert liveness(empty).peak_node == ""
