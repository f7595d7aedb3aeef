"""Passes that replace attention at prefill by attention over blocks of keys that they select."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

from effopt.graph import ops
from effopt.graph.ops.base import hint
from effopt.graph.provenance import layer_of
from effopt.graph.rewrite import Emit, PassResult, require
from effopt.graph.values import shape_of, val
from effopt.passes.base import Context, Stage, option
from effopt.passes.site import Site, SitePass

_UNREACHED = -1e9
"""No score comes near a fill at or below this: what is masked takes no weight from what is not."""
SELECTED = "selected-blocks"
"""What a pass provides that writes attention over blocks that it selects."""
_UNKNOWN = ("bias", "sinks", "query_ids", "anchors", "prefix")


@dataclass(frozen=True)
class Prefill:
    """An attention whose keys can be selected by blocks."""

    query: Node
    key: Node
    value: Node
    scale: float
    softcap: float
    is_causal: bool
    key_mask: Node | None
    """As the op's mask: one row over keys for all queries and heads."""
    masked_rows: str


@dataclass(frozen=True)
class BlockSelector(SitePass):
    """A site is an attention of at least `least` queries; shorter ones, such as decoding steps, stay dense.

    So prefill and decode agree under every option and every plan: the technique is a function of the call,
    not of the graph that holds it. Where the number of queries is a symbol, a guard holds it on one side.
    """

    stage: ClassVar[Stage] = Stage.ATTENTION
    after: ClassVar[tuple[str, ...]] = ("prove-causal", "recover-mask-structure", "prove-rows-see-key")
    provides: ClassVar[tuple[str, ...]] = (SELECTED,)
    causal: ClassVar[bool | None] = None
    """Whether it takes attention with causality, without, or either."""

    block: int = option(64, "tokens in a block, of queries and of keys", min=8, max=1024)
    least: int = option(256, "queries of a call that is treated; one with fewer reads all keys", min=2)

    @abstractmethod
    def select(self, emit: Emit, call: Prefill, form: Mapping[str, Any]) -> Node:
        """Emit the selection of blocks, as `ops.block_sparse_attention` takes it."""

    @abstractmethod
    def density(self, call: Prefill, form: Mapping[str, Any]) -> float:
        """About the share of open pairs that it selects, where sizes are what they are hinted to be."""

    def fits(self, call: Prefill, form: Mapping[str, Any], node: Node) -> None:
        """What one selector alone asks of a call. Raises `Reject`."""

    def sites(self, module: GraphModule, context: Context, result: PassResult) -> Sequence[Site]:
        """The attentions with enough queries, by the path of the module that holds them."""
        found = []
        for node in module.graph.find_nodes(op="call_function", target=ops.block_sparse_attention.overload):
            by = node.meta.get("effopt", ("another pass",))[0]
            if by != self.name:
                result.reject(self.name, node, f"{by} selects its blocks already")
        for number, node in enumerate(
            module.graph.find_nodes(op="call_function", target=ops.attention.overload)
        ):
            shape = shape_of(node.args[0])
            if (reason := self._too_short(shape[-2])) is not None:
                result.reject(self.name, node, reason)
                continue
            heads = hint(shape[1]) if len(shape) == 4 else 1
            kind = f"attention [{heads} heads of {hint(shape[-1])}]"
            found.append(Site(node, layer_of(node) or f"attention {number}", kind))
        return found

    def _too_short(self, t: Any) -> str | None:
        if statically_known_true(t == 1):
            return "one query: a decoding step reads all keys"
        # A guard, not a hint: a call on the other side is compiled again, and reads all keys.
        if not guard_or_false(t >= self.least):
            return f"{t} queries, fewer than least={self.least}: it reads all keys"
        return None

    def decide(self, site: Site, context: Context) -> Any:
        """The options that say which blocks: all but `least`."""
        fields = (f.name for f in dataclasses.fields(self) if f.name != "least")
        form = {name: getattr(self, name) for name in fields}
        self._legal(site.node, form, context)
        return form

    def enact(
        self, site: Site, decision: Any, module: GraphModule, context: Context, result: PassResult
    ) -> None:
        """Select blocks, and attend to those."""
        node = site.node
        call = self._legal(node, decision, context)
        emit = Emit(module.graph, node, node, self.name)
        try:
            made = self._emit(emit, call, decision)
        except BaseException:
            emit.undo()
            raise
        node.replace_all_uses_with(made)
        result.apply(self.name, "block_sparse_attention", node, f"density about {made.kwargs['density']:g}")
        module.graph.erase_node(node)

    def _emit(self, emit: Emit, call: Prefill, form: Mapping[str, Any]) -> Node:
        mask = None if call.key_mask is None else _by_entry(emit, call.key_mask)
        call = dataclasses.replace(call, key_mask=mask)
        given: dict[str, Any] = {"softcap": call.softcap, "is_causal": call.is_causal, "key_mask": mask}
        given |= {"masked_rows": call.masked_rows}
        kept = {k: v for k, v in given.items() if v not in (None, False, 0.0, "nan")}
        blocks = self.select(emit, call, form)
        settings = {"block": form["block"], "scale": call.scale}
        density = round(min(1.0, self.density(call, form)), 4)
        operands = (call.query, call.key, call.value, blocks)
        return emit(ops.block_sparse_attention, *operands, **settings, **kept, density=density)

    def _legal(self, node: Node, form: Mapping[str, Any], context: Context) -> Prefill:
        require(not context.training, "training: attention over blocks has no backward pass", node)
        call = prefill(node)
        if self.causal is not None:
            words = "causal" if call.is_causal else "not causal"
            require(call.is_causal == self.causal, f"{words}, and what it selects is not made for that", node)
        self.fits(call, form, node)
        return call


def _by_entry(emit: Emit, mask: Node) -> Node:
    """A mask over keys as `[b or 1, s]`."""
    aten, batched = torch.ops.aten, len(shape_of(mask)) == 4
    while len(shape_of(mask)) > (2 if batched else 1):
        mask = emit(aten.select.int, mask, 1 if batched else 0, 0)
    return mask if batched else emit(aten.unsqueeze.default, mask, 0)


def prefill(node: Node) -> Prefill:
    """An attention as a selector takes it. Raises `Reject` with what is in the way."""
    bound = ops.attention.bind(node.args, node.kwargs)
    query, key, value = (bound[name] for name in ("query", "key", "value"))
    rank = len(shape_of(query))
    require(rank == 4, f"{rank} dimensions, and blocks are selected for a batch and heads, 4", node)
    for name in _UNKNOWN:
        require(bound[name] is None, f"{name}: attention over blocks has none", node)
    require(not bound["dropout_p"], "dropout: attention over blocks has none", node)
    high = bound["high"]
    is_causal = bound["is_causal"] or (high is not None and statically_known_true(val(high) == 0))
    require(bound["low"] is None, "a window bounds the keys of each query already", node)
    require(
        high is None or is_causal,
        "its queries do not begin at the first key: a prompt in parts reads all keys",
        node,
    )
    mask, fill = bound["mask"], bound["fill"]
    is_finite = fill is not None and fill != float("-inf")
    require(not is_finite or fill <= _UNREACHED, f"masked scores become {fill}, which takes weight", node)
    require(mask is None or _over_keys(mask), "a mask that is not one row over keys stays a tensor", node)
    both = mask is not None and bound["is_causal"] and is_finite
    require(not both, f"causal, and a mask that fills with {fill}: its blind rows are not known", node)
    rows = "zero" if bound["zero_masked_rows"] else "mean" if is_finite else "nan"
    return Prefill(query, key, value, bound["scale"], bound["softcap"], is_causal, mask, rows)


def _over_keys(mask: Node) -> bool:
    """Whether a mask is one row over keys, of each batch entry or of all."""
    shape = shape_of(mask)
    known = all(statically_known_true(size == 1) for size in (shape[1:-1] if len(shape) == 4 else shape[:-1]))
    return 1 <= len(shape) <= 4 and known and not statically_known_true(shape[-1] == 1)
