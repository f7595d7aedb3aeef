"""What passes ask of a mask or bias: whether it is causal, whether every row sees a key."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effopt.graph.analyses.masks import conditions as c
from effopt.graph.analyses.masks.biases import MASKED, bias_of
from effopt.graph.analyses.masks.evaluation import evaluate
from effopt.graph.analyses.masks.forms import Band, Form, form_of, form_of_condition
from effopt.graph.analyses.masks.least_number import FILLS, WHERE, least_number
from effopt.graph.analyses.masks.sums import Axis, Sum, highest, lowest, of, whole
from effopt.graph.values import shape_of, val

_aten = torch.ops.aten
_PASS = {
    *(_aten.expand.default, _aten.clone.default, _aten._to_copy.default, _aten.detach.default),
    *(_aten.view.default, _aten.reshape.default, _aten._unsafe_view.default, _aten.unsqueeze.default),
    _aten.lift_fresh_copy.default,
}
_BUILDS_MASK = {*WHERE, *FILLS, _aten.tril.default, _aten.triu.default, _aten.mul.Tensor}
CAUSAL = Band(high=whole(0))


def opening(mask: Node) -> Form | None:
    """The form of a mask, or of what a bias leaves open that only hides keys; None for other biases."""
    if not 1 <= len(shape_of(mask)) <= 4:
        return None
    if val(mask).dtype == torch.bool:
        return form_of(mask)
    bias = bias_of(mask)
    return None if bias.added or not bias.hidden else form_of_condition(bias.open)


def is_causal(mask: Node) -> bool:
    """Whether a boolean mask is True, or a bias 0, exactly where key <= query, and masks the rest."""
    form = opening(mask)
    if form is not None and form.terms == (CAUSAL,):
        return True
    known = evaluate(mask)
    if known is None or known.dim() < 2:
        return False
    t, s = known.shape[-2:]
    wanted = torch.ones(t, s, dtype=torch.bool).tril().expand(known.shape)
    if known.dtype == torch.bool:
        return bool((known == wanted).all())
    return bool(((known == 0) == wanted).all() and ((known <= MASKED) == ~wanted).all())


def every_row_sees(mask: Node) -> bool:
    """Whether no row of a mask (bool: all False; float: all -inf) is without a key."""
    if val(mask).dtype != torch.bool and least_number(mask) > -math.inf:
        return True
    sizes = shape_of(mask)
    form = opening(mask)
    if form is not None and len(sizes) > 1 and sees_key(form, sizes[-2], sizes[-1]):
        return True
    known = evaluate(mask)
    if known is None or known.dim() < 1:
        return False
    return bool((known if known.dtype == torch.bool else known > -math.inf).any(-1).all())


def sees_key(form: Form, t: Any, s: Any) -> bool:
    """Whether each of `t` queries sees one of `s` keys: the first, its own, or the last of the band."""
    query = of(Axis("query", t))
    last = form.band.high
    tried = [whole(0), query, *([query + last] if last is not None else [])]
    return any(_is_index(key, s) and c.replaced(form.condition, {"key": key}) == c.TRUE for key in tried)


def _is_index(key: Sum, s: Any) -> bool:
    low, high = lowest(key), highest(key)
    return (
        low is not None
        and high is not None
        and statically_known_true(low >= 0)
        and statically_known_true(high <= s - 1)
    )


def is_mask(node: Node) -> bool:
    """Whether a mask or bias is built as masks are, or is an input; False for what is only a learned bias."""
    while val(node).dtype != torch.bool and node.target in _PASS:
        node = node.all_input_nodes[0]
    given = node.op != "call_function"
    return given or val(node).dtype == torch.bool or node.target in _BUILDS_MASK
