"""`effopt plugins`: what is installed, what each plugin registers, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table
from rich.text import Text

from effopt.commands.terminal import output

if TYPE_CHECKING:
    from effopt.plugins.manager import Registry

_REGISTERING = ("effopt_passes", "effopt_ops", "effopt_lowerings")


def plugins() -> None:
    """List the plugins and what each registers. Exit code 1 if one of them is at fault."""
    from effopt.plugins.manager import build_registry

    registry = build_registry()
    console = output()
    for name, plugin in registry.manager.list_name_plugin():
        module = getattr(plugin, "__name__", type(plugin).__module__)
        console.print(f"[bold]{name}[/bold]  [dim]{module}[/dim]", highlight=False)
        grid = Table.grid(padding=(0, 2), pad_edge=True)
        for kind, names in _registered(registry, name, plugin):
            grid.add_row(Text(kind, style="dim"), Text(", ".join(names)))
        console.print(grid)
    for fault in registry.faults:
        console.print(Text(f"fault: {fault}", style="red"))
    if registry.faults:
        raise typer.Exit(1)


def _registered(registry: Registry, name: str, plugin: Any) -> Iterator[tuple[str, list[str]]]:
    """(kind, names) of what one plugin brings."""
    kernels: dict[str, list[str]] = {}
    for lowering in _given(plugin, "effopt_lowerings"):
        kernels.setdefault(lowering.op.name, []).append(lowering.name)
    callers = registry.manager.get_hookcallers(plugin) or []
    found = {
        "passes": [n for n, origin in registry.origin.items() if origin == name],
        "ops": [op.name for op in _given(plugin, "effopt_ops")],
        "lowerings": [f"{op} ({', '.join(names)})" for op, names in kernels.items()],
        "other hooks": [c.name for c in callers if c.name not in _REGISTERING],
    }
    yield from ((kind, names) for kind, names in found.items() if names)


def _given(plugin: Any, hook: str) -> tuple[Any, ...]:
    """What a registration hook of a plugin returns; the registry has called it without a fault before."""
    function = getattr(plugin, hook, None)
    return tuple(function()) if function is not None else ()
