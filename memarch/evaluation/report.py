"""A table for the eye and for the disk: a grid on the terminal; JSON (everything), CSV (for a spreadsheet) and a figure in a folder."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table as Grid

from memarch.evaluation.table import Row, Table, label


def with_error(mean: float, error: float | None) -> str:
    return f"{mean:.3f}" if error is None else f"{mean:.3f} ±{f'{error:.3f}'.removeprefix('0')}"


def show(table: Table, console: Console | None = None) -> None:
    """Two axes are laid out as columns and rows; ± is the standard error over examples (documents, for text)."""
    console = console or Console()
    if len(table.axes) == 2:
        console.print(_pivot(table))
    else:
        console.print(_plain(table))
    for reason in table.skipped:
        console.print(f"skipped {reason}", style="dim", highlight=False)


def _pivot(table: Table) -> Grid:
    across, down = table.axes
    columns = sorted({row[across] for row in table.rows})
    grid = Grid(box=box.SIMPLE_HEAD, title=f"{table.task}: {table.metric}", title_justify="left")
    grid.add_column(f"{down} \\ {across}")
    for value in columns:
        grid.add_column(f"{value:g}", justify="right", no_wrap=True)
    found = {(row[across], row[down]): with_error(row[table.metric], row["error"]) for row in table.rows}
    for value in sorted({row[down] for row in table.rows}):
        grid.add_row(f"{value:g}", *(found.get((column, value), "") for column in columns))
    return grid


def _plain(table: Table) -> Grid:
    grid = Grid(box=box.SIMPLE_HEAD, title=table.task, title_justify="left")
    names = [name for name in table.rows[0] if name != "error"]
    for name in names:
        grid.add_column(name.replace("_", " "), justify="right")
    for row in table.rows:
        shown = {**row, table.metric: with_error(row[table.metric], row["error"])}
        grid.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in (shown[name] for name in names)))
    return grid


def write(table: Table, folder: Path | str, *, pdf: bool = False) -> list[Path]:
    """<task>.json, <task>.csv, one CSV per part, <task>.png, and <task>.pdf on request. Returns what was written."""
    from memarch.evaluation import plots

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{table.task}.json"]
    files[0].write_text(json.dumps(table.to_dict(), indent=1) + "\n")
    files.append(write_csv(folder / f"{table.task}.csv", table.rows))
    files += [write_csv(folder / f"{table.task}-{name}.csv", rows) for name, rows in table.parts.items()]
    return files + plots.save(plots.draw(table), folder / f"{table.task}.png", pdf)


def read(file: Path | str) -> Table:
    """A table that `write` wrote."""
    return Table.from_dict(json.loads(Path(file).read_text()))


def write_csv(file: Path, rows: Sequence[Row]) -> Path:
    """Columns in the order in which rows bring them; a row that lacks one leaves it empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, names)
        writer.writeheader()
        writer.writerows(rows)
    return file


def line(table: Table) -> str:
    """One sentence per cell, for a log."""
    return "; ".join(f"{label(table.settings(row))}: {with_error(row[table.metric], row['error'])}" for row in table.rows)
