"""Finds plugins and isolates their faults. One registry per compile call: nothing is global."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pluggy

from effopt.backends.base import Lowering
from effopt.backends.reference import reference_lowering
from effopt.errors import PluginError, unknown
from effopt.graph.ops.base import Op
from effopt.passes.base import Pass
from effopt.plugins import builtin, hookspec

GROUP = "effopt"
_HOOKS = tuple(sorted(n for n in vars(hookspec) if n.startswith("effopt_")))
_REGISTERING = ("effopt_passes", "effopt_ops", "effopt_lowerings")


@dataclass
class Registry:
    """Everything that plugins registered, and the hooks to call."""

    manager: pluggy.PluginManager
    passes: dict[str, type[Pass]] = field(default_factory=dict)
    ops: dict[str, Op] = field(default_factory=dict)
    lowerings: dict[str, list[Lowering]] = field(default_factory=dict)
    """Op name -> its lowerings, the reference last."""
    origin: dict[str, str] = field(default_factory=dict)
    """Pass name -> the plugin that registered it."""
    op_origin: dict[str, str] = field(default_factory=dict)
    """Op name -> the plugin that registered it."""
    faults: list[str] = field(default_factory=list)
    """What went wrong in which plugin; those plugins are left out, the others work."""

    def fault(self, words: str) -> None:
        """Note a fault once."""
        if words not in self.faults:
            self.faults.append(words)

    def origin_of(self, pass_: Pass) -> str:
        """The plugin that registered this pass; `the call's options` for an instance that none did."""
        known = self.passes.get(pass_.name) is type(pass_)
        return self.origin[pass_.name] if known else "options of the call"

    @property
    def hook(self) -> Any:
        """The hook caller of pluggy."""
        return self.manager.hook


@functools.cache
def _entry_points() -> tuple[importlib.metadata.EntryPoint, ...]:
    return tuple(importlib.metadata.entry_points(group=GROUP))


def build_registry(extra: Sequence[Any] = ()) -> Registry:
    """A registry with the built-ins, the installed plugins, and `extra` plugin objects.

    A plugin that cannot be imported, or that raises in a registration hook, is left out and named
    in `faults`.

    Raises:
        PluginError: a fault of the built-ins themselves, without which a pipeline would do nothing.
    """
    manager = pluggy.PluginManager("effopt")
    manager.add_hookspecs(hookspec)
    registry = Registry(manager)
    manager.register(builtin, "effopt")
    for entry in _entry_points():
        try:
            plugin = entry.load()
        except Exception as error:  # noqa: BLE001 - anything can happen in a foreign import
            registry.faults.append(f"plugin {entry.name!r} ({entry.value}) failed to load: {_say(error)}")
        else:
            _register(registry, plugin, entry.name)
    for plugin in extra:
        _register(registry, plugin, _name_of(plugin))
    for named in _in_order(manager):
        _collect(registry, named)
    return registry


def _register(registry: Registry, plugin: Any, name: str) -> None:
    try:
        if inspect.isclass(plugin):
            raise PluginError(f"{plugin.__name__} is a class; give an instance of it")
        registry.manager.register(plugin, name)
        _check_hooks(registry.manager, plugin)
    except Exception as error:  # noqa: BLE001 - a plugin's own fault: it is left out by name
        if registry.manager.has_plugin(name):
            registry.manager.unregister(name=name)
        registry.faults.append(f"plugin {name!r} failed to register: {_say(error)}")


def _check_hooks(manager: pluggy.PluginManager, plugin: Any) -> None:
    """Raise for a hook that is not there, or would never be called, and for a plugin without any."""
    for caller in manager.get_hookcallers(plugin) or ():
        if not caller.has_spec():
            raise unknown("hook", caller.name, _HOOKS)
    named = [hook for hook in _HOOKS if callable(getattr(plugin, hook, None))]
    if not named:
        raise PluginError(f"{plugin!r} has no hook; there are: {', '.join(_HOOKS)}")
    for hook in named:
        if hook not in _REGISTERING and manager.parse_hookimpl_opts(plugin, hook) is None:
            raise PluginError(f"hook {hook!r} is not marked with effopt.hookimpl, so it is never called")


def _in_order(manager: pluggy.PluginManager) -> list[tuple[str, Any]]:
    named = list(manager.list_name_plugin())
    first = [p for p in named if p[0] == "effopt"]
    return first + [p for p in named if p[0] != "effopt"]


def _collect(registry: Registry, named: tuple[str, Any]) -> None:
    """Take one plugin's registrations, all or none."""
    name, plugin = named
    try:
        passes = _call(plugin, "effopt_passes")
        ops = _call(plugin, "effopt_ops")
        lowerings = _call(plugin, "effopt_lowerings")
        _check(registry, name, passes, ops, lowerings)
    except Exception as error:  # a plugin's own fault: it is left out by name
        if plugin is builtin:
            raise PluginError(
                f"effopt's own passes, ops and lowerings cannot be registered: {_say(error)}"
            ) from error
        registry.faults.append(f"plugin {name!r} failed while registering: {_say(error)}")
        registry.manager.unregister(plugin)
        return
    if plugin is not builtin:
        _isolate(registry, name, plugin)
    for pass_ in passes:
        registry.passes[pass_.name] = pass_
        registry.origin[pass_.name] = name
    registry.ops.update((op.name, op) for op in ops)
    registry.op_origin.update((op.name, name) for op in ops)
    for lowering in lowerings:
        known = registry.lowerings.setdefault(lowering.op.name, [])
        # The reference accepts everything and must stay last.
        known.insert(len(known) - 1 if known and known[-1].name == "reference" else len(known), lowering)
    for op in ops:
        known = registry.lowerings.setdefault(op.name, [])
        if not known or known[-1].name != "reference":
            known.append(reference_lowering(op))


def _isolate(registry: Registry, name: str, plugin: Any) -> None:
    """Turn what a plugin's hooks raise into faults. Only registration faults leave the plugin out."""
    for caller in registry.manager.get_hookcallers(plugin) or ():
        for implementation in caller.get_hookimpls():
            if implementation.plugin is plugin:
                guard = _guard_wrapper if implementation.wrapper else _guard
                what = f"plugin {name!r}: {caller.name}"
                # Final to pluggy's own code; a proxy plugin would lose the options of the decorator.
                implementation.function = guard(registry, what, implementation.function)  # type: ignore[misc]


def _guard(registry: Registry, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        given = [list(a) if isinstance(a, list) else None for a in args]
        try:
            result = function(*args)
            for stray in (p for a in args if isinstance(a, list) for p in a if not isinstance(p, Pass)):
                raise PluginError(f"the pipeline holds {stray!r}, which is not a pass")
            return result
        except Exception as error:  # noqa: BLE001 - named in the report; the other plugins go on
            registry.fault(f"{what} raised {_say(error)}")
            for argument, copy in zip(args, given, strict=True):
                if copy is not None:
                    argument[:] = copy
            return None

    return call


def _guard_wrapper(registry: Registry, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Generator[None, Any, Any]:
        try:
            wrapper = function(*args)
            next(wrapper)
        except Exception as error:  # noqa: BLE001 - as above; the wrapped hook runs without this wrapper
            registry.fault(f"{what} raised {_say(error)}")
            return (yield)
        result = yield
        try:
            wrapper.send(result)
        except StopIteration as stop:
            return stop.value
        except Exception as error:  # noqa: BLE001 - as above; the wrapped result stands
            registry.fault(f"{what} raised {_say(error)}")
        return result

    return call


def _call(plugin: Any, hook: str) -> Sequence[Any]:
    function = getattr(plugin, hook, None)
    return tuple(function()) if function is not None else ()


def _check(
    registry: Registry, name: str, passes: Sequence[Any], ops: Sequence[Any], lowerings: Sequence[Any]
) -> None:
    for pass_ in passes:
        if not (inspect.isclass(pass_) and issubclass(pass_, Pass)):
            raise PluginError(f"effopt_passes returned {pass_!r}, which is not a Pass class")
        if [p.name for p in passes].count(pass_.name) > 1:
            raise PluginError(f"effopt_passes returned two passes with the name {pass_.name!r}")
        if pass_.name in registry.passes:
            raise PluginError(f"pass {pass_.name!r} is registered by {registry.origin[pass_.name]!r} already")
    for op in ops:
        if not isinstance(op, Op):
            raise PluginError(f"effopt_ops returned {op!r}, which is not an Op")
        if op.name in registry.ops:
            raise PluginError(f"op {op.name!r} is registered by {registry.op_origin[op.name]!r} already")
    for lowering in lowerings:
        if not isinstance(lowering, Lowering):
            raise PluginError(f"effopt_lowerings returned {lowering!r}, which is not a Lowering")


def _name_of(plugin: Any) -> str:
    return getattr(plugin, "__name__", None) or f"{type(plugin).__name__}-{id(plugin):x}"


def _say(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
