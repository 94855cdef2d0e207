"""metrics.csv: one row a step, readable at any moment, its columns grow as names turn up.

Lightning's CSVLogger deletes the file of an earlier run in the same folder, keeps no order of columns and writes training and validation
of one step as two rows. Here a row is appended by one write; only a new column rewrites the file, beside the old one and then in its place.
"""

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

Value = int | float | str


class Table:
    """Opens (or begins) the file as it was at the end of step `last`: what a killed run wrote after that is dropped, for it will come again."""

    def __init__(self, path: Path, last: int):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        columns, rows = read(path)
        self.columns = columns or ["step"]
        self._replace([row for row in rows if int(row["step"]) <= last])

    def add(self, row: Mapping[str, Value]) -> None:
        new = [name for name in row if name not in self.columns]
        if new:
            self.columns += new
            self._replace(read(self.path)[1])
        with self.path.open("a", newline="") as file:
            file.write(text(self.columns, [row]))

    def _replace(self, rows: Iterable[Mapping[str, Value]]) -> None:
        beside = self.path.with_name(f".{self.path.name}.tmp")
        beside.write_text(text(self.columns, [dict(zip(self.columns, self.columns, strict=True)), *rows]), newline="")
        os.replace(beside, self.path)


def read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows. A last line without its end was cut off by a kill and does not count."""
    if not path.is_file():
        return [], []
    whole, _, _ = path.read_text().rpartition("\n")
    reader = csv.DictReader(io.StringIO(whole))
    return list(reader.fieldnames or []), [row for row in reader if (row.get("step") or "").isdigit()]


def text(columns: list[str], rows: Iterable[Mapping[str, Value]]) -> str:
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows([show(row.get(name, "")) for name in columns] for row in rows)
    return lines.getvalue()


def show(value: Value) -> str:
    """Nine digits say an fp32 number exactly."""
    return f"{value:.9g}" if isinstance(value, float) else str(value)
