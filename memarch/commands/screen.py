"""What commands show: tables, sizes, and a bar while something takes long."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress
from rich.console import Console

from memarch.units import count, size

__all__ = ["console", "count", "size", "working"]

WIDE = 160  # columns where nobody looks at a terminal: a table in a log or a pipe is not folded


def console(stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else WIDE, highlight=False)


@contextmanager
def working(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, on stderr so that stdout holds results only; nothing anywhere else."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TaskProgressColumn(), progress.TimeRemainingColumn())
    with progress.Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n: bar.advance(task, n)
