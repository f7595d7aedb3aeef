"""One graph on its way through: captured, rewritten by the pipeline, lowered, handed over."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch.fx import GraphModule

from effopt.backends import inductor, run_time
from effopt.backends.lower import lower
from effopt.backends.measured import Measurer
from effopt.backends.outline import outline
from effopt.backends.written_out import write_out
from effopt.errors import CaptureRefused, PlanError
from effopt.graph import release
from effopt.graph.analyses.gradients import differentiable
from effopt.graph.capture import Captured, capture
from effopt.graph.held_masks import HeldMasks
from effopt.graph.kept_blocks import KeptBlocks, give_blocks, reusing
from effopt.graph.restore import restore
from effopt.graph.rewrite import Rejected
from effopt.graph.weights import DerivedWeights
from effopt.options import Options
from effopt.passes.base import Context, Pass
from effopt.passes.plan import Plan
from effopt.passes.plans import Plans
from effopt.passes.region import RegionPass
from effopt.plugins.manager import Registry
from effopt.plugins.observers import observers
from effopt.plugins.report import GraphReport, LoweringRecord
from effopt.target import target_of_inputs


class Compilation:
    """The compilation of one graph; made for it, and run once."""

    def __init__(
        self,
        options: Options,
        registry: Registry,
        pipeline: list[Pass],
        plans: tuple[Plan, ...],
        report: GraphReport,
        otherwise: Callable[[], Callable[..., Any]],
        is_read: bool = True,
    ) -> None:
        self.options, self.registry, self.pipeline, self.report = options, registry, pipeline, report
        self.plans = Plans(plans, pipeline=report.pipeline)
        self.masks, self.is_read = HeldMasks(), is_read
        self.otherwise = otherwise
        """Makes the graph without what stands on buffers; it is compiled when it is first called."""
        watching = observers(
            registry,
            report,
            verify=options.verify,
            rtol=options.rtol,
            fuel=options.fuel,
            dump=options.dump,
            runs_backend=options.lowering != "eager",
        )
        for name, plugin in watching:
            registry.manager.register(plugin, name)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.report.seconds[stage] = self.report.seconds.get(stage, 0.0) + time.perf_counter() - start

    def _survey(self, moment: Literal["before", "after"], captured: Captured) -> None:
        """Costs and listings, which cost time of their own, are gathered only for a report that is read."""
        if self.is_read:
            with self._timed("report"):
                self.report.survey(moment, captured.module.graph, self.registry.ops)

    def run(self, module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Make what is called in place of `module`, and fill the report on the way.

        Args:
            module: the graph that Dynamo captured.
            inputs: its real inputs.

        Raises:
            PlanError: a plan cannot be carried out in all graphs of the model.
        """
        try:
            with self._timed("capture"):
                captured = capture(module, inputs)
        except CaptureRefused as why:
            self.report.refused = str(why)
            self._refuse_unplanned(
                f"one is left as it is, for {why}. Compile only the module that holds the layers"
            )
            weights = DerivedWeights(inputs)
            release.note_readers(module, weights)
            return run_time.with_fresh_weights(self._hand_over(module, inputs), weights)
        # Casts are nodes of the captured graph: from here on, autocast would make them a second time.
        with torch._C._DisableAutocast():
            self.masks.inputs = inputs
            compiled = run_time.while_masks_hold(self._compile(captured, inputs), self.masks, self.otherwise)
        if torch._C._is_any_autocast_enabled():
            compiled = run_time.without_autocast(compiled)
        return run_time.unless_storage_is_shared(compiled, captured.mutated, inputs, self._original(module))

    def _original(self, module: GraphModule) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            self._refuse_unplanned("two inputs of one share memory, and one of them is written")
            release.refuse_released(inputs)
            return module(*inputs)

        return run

    def _refuse_last_graph(self) -> None:
        """Past its limit Dynamo runs a function eagerly and warns: then without what was planned."""
        compiling = torch._guards.CompileContext.current_compile_id()
        limit = torch._dynamo.config.recompile_limit
        if compiling is not None and (compiling.frame_compile_id or 0) + 1 >= limit:
            self._refuse_unplanned(
                f"this is the last of {limit} graphs that Dynamo compiles of one function, and after it the"
                " model would run as it is. Raise torch._dynamo.config.recompile_limit, or compile with"
                " dynamic=True"
            )

    def _refuse_unplanned(self, why: str) -> None:
        """Layers left out of one graph and run in another would mix two models. Raises PlanError."""
        follow = (p for p in self.pipeline if isinstance(p, RegionPass) or self.plans.section(p.name))
        planned = [p.spec() for p in follow]
        if planned:
            raise PlanError(f"{', '.join(planned)} cannot be carried out in all graphs of this model: {why}")

    def _compile(self, captured: Captured, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.report.training = captured.training
        self._refuse_last_graph()
        self._keep_from_inductor(captured, inputs)
        weights = DerivedWeights(inputs)
        self._transform(captured, inputs, weights)
        lowered = self._lower(captured, inputs, weights)
        weights.materialize(lowered)
        release.note_readers(lowered, weights)
        given = [*inputs, *weights.lift(lowered)]
        kept = KeptBlocks.of(lowered, given)
        if kept is None:
            compiled = self._finish(lowered, given, captured.training)
        else:
            again, blocks = reusing(lowered)
            give_blocks(lowered)
            choose = self._finish(lowered, given, captured.training)
            reuse = self._finish(again, [*given, *blocks], captured.training)
            compiled = run_time.between_steps(choose, reuse, kept)
        if self.options.release_weights:
            self.report.take(release.release(lowered, weights))
        return run_time.with_fresh_weights(compiled, weights)

    def _keep_from_inductor(self, captured: Captured, inputs: Sequence[Any]) -> None:
        """Run a graph eagerly whose writes AOTAutograd would lose."""
        lost = [p for p in captured.mutated if inductor.loses_writes(inputs[p])]
        if not lost or self.options.lowering == "eager":
            return
        placeholders = captured.module.graph.find_nodes(op="placeholder")
        for node in (list(placeholders)[position] for position in lost):
            self.report.rejected.append(Rejected("inductor", node.name, "", "", inductor.LOST_WRITES))
        self.options = replace(self.options, lowering="eager")

    def _transform(self, captured: Captured, inputs: Sequence[Any], weights: DerivedWeights) -> None:
        module, hook = captured.module, self.registry.hook
        context = Context(
            target=target_of_inputs(inputs),
            training=captured.training,
            approve=lambda p, m, r: hook.effopt_approve_rewrite(pass_=p, match=m, replacement=r),
            weights=weights,
            masks=self.masks,
            plans=self.plans,
        )
        self.report.nodes_before = len(module.graph.nodes)
        self._survey("before", captured)
        hook.effopt_compile_start(module=module, options=self.options)
        for pass_ in self.pipeline:
            self.report.take(hook.effopt_run_pass(pass_=pass_, module=module, context=context))
        self.report.planned = self.plans.decided
        module.graph.eliminate_dead_code()
        self.report.nodes_after = len(module.graph.nodes)
        overloads = {op.overload: op.name for op in self.registry.ops.values()}
        self.report.ops = Counter(overloads[n.target] for n in module.graph.nodes if n.target in overloads)
        self._survey("after", captured)

    def _lower(self, captured: Captured, inputs: Sequence[Any], weights: DerivedWeights) -> GraphModule:
        with self._timed("lower"):
            measurer = self._measurer(captured, inputs) if self.options.lowering == "measured" else None
            chosen = lower(
                captured.module,
                self.registry.ops,
                self.registry.lowerings,
                target_of_inputs(inputs),
                captured.training,
                self.options.lowering,
                weights,
                measurer,
            )
            self.report.faults.extend(measurer.faults if measurer else ())
            self.report.lowerings = [
                LoweringRecord(c.node, c.op, c.choice.lowering.name, c.choice.refused) for c in chosen
            ]
            return restore(captured, runs_eagerly=self.options.lowering == "eager")

    def _measurer(self, captured: Captured, inputs: Sequence[Any]) -> Measurer:
        carrying = differentiable(captured.module, inputs) if captured.training else frozenset()
        return Measurer(carrying, self._settings())

    def _settings(self) -> dict[str, Any]:
        return {**inductor.mode_options(self.options.mode), **self.options.inductor}

    def _finish(self, module: GraphModule, inputs: Sequence[Any], training: bool) -> Callable[..., Any]:
        if not self.options.outline or self.options.lowering == "eager":
            return self._hand_over(module, inputs)
        with self._timed("outline"):
            refused = inductor.why_no_subgraphs(self._settings())
            self.report.outlined = outline(module, inputs, training, refused)
        if all(block.left for block in self.report.outlined):
            return self._hand_over(module, inputs)
        try:
            return self._hand_over(module, inputs)
        except Exception as error:  # noqa: BLE001 - what is at fault elsewhere fails again without blocks
            first = str(error).strip().partition("\n")[0]
            why = f"Inductor failed on its calls: {type(error).__name__}: {first}"
        write_out(module)
        self.report.outlined = [b if b.left else replace(b, left=why) for b in self.report.outlined]
        return self._hand_over(module, inputs)

    def _hand_over(self, module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        if self.options.lowering == "eager":
            return inductor.run_eagerly(module)
        with self._timed("backend"):
            identity = "|".join(p.fingerprint() for p in self.pipeline)
            return inductor.compile_graph(module, inputs, self._settings(), identity)
