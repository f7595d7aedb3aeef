"""The command line. Exit codes: 0 fine, 1 a check that failed, 2 bad input."""

from __future__ import annotations

import sys

import typer
from rich.text import Text

from effopt.commands.bench import bench
from effopt.commands.bisect import bisect
from effopt.commands.demo import demo
from effopt.commands.explain import explain
from effopt.commands.passes import passes
from effopt.commands.plugins import plugins
from effopt.commands.terminal import errors
from effopt.commands.tune import tune
from effopt.errors import CheckFailed, EffoptError

app = typer.Typer(
    help="Graph optimisation passes for PyTorch, checked and explained.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (demo, passes, explain, tune, bisect, plugins):
    app.command()(command)
app.add_typer(bench, name="bench")


def main() -> None:
    """Run one command. What effopt raises is shown on one line, without a traceback."""
    try:
        app(prog_name="effopt")
    except EffoptError as error:
        errors().print(Text(f"error: {error}", style="red"), soft_wrap=True)
        sys.exit(1 if isinstance(error, CheckFailed) else 2)
