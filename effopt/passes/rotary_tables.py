"""What passes over rotary tables share: sites, and one decision for all graphs of a model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node
from torch.utils.weak import WeakTensorKeyDictionary

from effopt.errors import PlanError
from effopt.graph import ops
from effopt.graph.analyses.rotary_tables import RotaryTable, table_of
from effopt.graph.provenance import layer_of
from effopt.graph.rewrite import Emit, PassResult, Reject, require
from effopt.passes.base import Context
from effopt.passes.plan import parameters_of
from effopt.passes.site import Site, SitePass


@dataclass(frozen=True)
class RotaryTablePass(SitePass):
    """A pass that changes the frequencies of rotary tables: of all rotations of a model, or of none.

    A site is a product of positions and frequencies that some rotation reads. Where the table of one rotation
    cannot be followed to its product, all are left. Graphs of a model that would then differ are a PlanError.
    """

    @abstractmethod
    def frequencies(self, emit: Emit, table: RotaryTable, decision: Any) -> Node:
        """Emit the new frequencies."""

    def sites(self, module: GraphModule, context: Context, result: PassResult) -> Sequence[Site]:
        """The products of this graph that rotations read."""
        found: dict[Node, Site] = {}
        ropes = module.graph.find_nodes(op="call_function", target=ops.rope.overload)
        for rope in ropes:
            try:
                table = table_of(rope)
            except Reject as why:
                result.reject(self.name, rope, f"{why.reason}; all rotations of a graph are changed, or none")
                return ()
            path = layer_of(table.product) or "rotary table"
            found[table.product] = Site(rope, path, f"rotary table of {table.half} angles")
        for node in module.graph.find_nodes(op="call_function", target=ops.attention.overload)[:1]:
            if not ropes:
                result.reject(self.name, node, "no rotary embedding is recognised in this graph")
        return tuple(found.values())

    def apply(self, module: GraphModule, context: Context) -> PassResult:
        """As every pass over sites, and one decision for the graphs of a model. Raises PlanError."""
        has_ropes = bool(module.graph.find_nodes(op="call_function", target=ops.rope.overload))
        result = super().apply(module, context)
        if has_ropes:
            given = parameters_of(module.graph, context.weights.inputs)
            key, fate = (context.plans.identity, self.spec()), bool(result.applied)
            for parameter in (p for node, p in given.items() if node.users):
                if _settled.setdefault(parameter, {}).setdefault(key, fate) != fate:
                    raise PlanError(
                        f"{self.spec()} changes the rotations of one graph of this model and leaves those of"
                        f" another, which would mix two models: {_reasons(result)}. Compile the model whole"
                    )
        return result

    def enact(
        self, site: Site, decision: Any, module: GraphModule, context: Context, result: PassResult
    ) -> None:
        """Put the new frequencies in place of the old."""
        table = table_of(site.node)
        self._refuse_twice(table)
        emit = Emit(module.graph, table.product, table.product, self.name)
        table.product.replace_input_with(table.frequencies, self.frequencies(emit, table, decision))
        result.apply(self.name, "rope", table.product, f"{table.half} angles: {decision}")

    def _refuse_twice(self, table: RotaryTable) -> None:
        made_by = table.frequencies.meta.get("effopt", ("",))[0]
        require(made_by != self.name, "", table.product)


def _reasons(result: PassResult) -> str:
    return "; ".join(dict.fromkeys(r.reason for r in result.rejected)) or "an earlier graph was left"


_settled: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Parameter -> (identity of `Plans`, pass) -> whether the rotations of a graph that reads it were changed."""
