"""The terminal: results on standard output, progress and errors on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

_PLAIN_WIDTH = 110  # of output that goes to a file or a pipe


def output() -> Console:
    """Where results go. Made afresh, so that a redirected stream is honoured."""
    console = Console()
    return console if console.is_terminal else Console(width=_PLAIN_WIDTH)


def errors() -> Console:
    """Where progress and errors go."""
    return Console(stderr=True)


@contextmanager
def progress(first: str) -> Iterator[Callable[[str], None]]:
    """A line that says what is going on, with a spinner; the yielded function changes it.

    Where standard error is no terminal, each stage that is new in kind is printed once.
    """
    console = errors()
    if not console.is_terminal:
        told: set[str] = set()

        def tell(what: str) -> None:
            kind = what.split(", ")[0]
            if kind not in told:
                told.add(kind)
                console.print(f"{kind} ...", highlight=False)

        tell(first)
        yield tell
        return
    with console.status(first) as status:
        yield lambda what: status.update(what)
