"""How far a long job is: a bar on a terminal, a few plain lines anywhere else (a log file should not fill with redrawn bars)."""

from types import TracebackType

from rich import progress as rich_progress
from rich.console import Console


class Progress:
    """with Progress("prepare", bytes) as progress: ... progress.advance(n)"""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done, self.said = what, total, 0, 0
        console = Console(stderr=True)
        columns = (rich_progress.TextColumn("{task.description}"), rich_progress.BarColumn(), rich_progress.DownloadColumn())
        rest = rich_progress.TimeRemainingColumn()
        self.bar = rich_progress.Progress(*columns, rest, console=console) if console.is_terminal else None
        self.console = console

    def __enter__(self) -> "Progress":
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task(self.what, total=self.total)
        return self

    def advance(self, n: int) -> None:
        self.done += n
        tenths = 10 * self.done // max(self.total, 1)
        if self.bar:
            self.bar.advance(self.task, n)
        elif tenths > self.said:
            self.said = tenths
            self.console.print(f"{self.what}: {self.done / 1e6:.1f} of {self.total / 1e6:.1f} MB", highlight=False)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()
