"""What commands show: tables, sizes, and a bar while something takes long."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress
from rich.console import Console

WIDE = 160  # columns where nobody looks at a terminal: a table in a log or a pipe is not folded


def console(stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else WIDE, highlight=False)


def count(n: int) -> str:
    """1234 -> 1.23k: three digits that matter."""
    return _scaled(n, 1000, ("", "k", "M", "G", "T"))


def size(n: int) -> str:
    return _scaled(n, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def _scaled(n: int, base: int, units: tuple[str, ...]) -> str:
    value, unit = float(n), 0
    while value >= 999.5 and unit + 1 < len(units):
        value, unit = value / base, unit + 1
    digits = 0 if unit == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f}{units[unit]}"


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
