"""What lies in the folder of one run, written and read: the config it is given, its row, its numbers, and the line that says why it failed."""

import csv
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memarch.ablation.plan import Run
from memarch.evaluation.table import Row, Table, label

RESULT, GIVEN, LOG = "result.json", "run.yaml", "log.txt"
ERROR = re.compile(r"^(error:|memarch:|[\w.]*(Error|Exception|Interrupt|NonFinite|Exit)\b)")


def given(run: Run, folder: Path) -> dict[str, Any]:
    about = {**run.config["run"], "folder": str(folder), "bar": False, "export": True}
    about = {key: value for key, value in about.items() if key not in ("name", "root")}
    return {**run.config, "run": about, "trainer": {**run.config["trainer"], "enable_progress_bar": False}}


def saved(folder: Path) -> Row | None:
    try:
        return json.loads((folder / RESULT).read_text())
    except (OSError, json.JSONDecodeError):  # none yet, or a disk that filled up: the run is not done
        return None


def save(folder: Path, row: Mapping[str, Any]) -> None:
    beside = folder / f".{RESULT}.{os.getpid()}"
    beside.write_text(json.dumps(row, indent=1) + "\n")
    os.replace(beside, folder / RESULT)


def measured(folder: Path) -> Row:
    """Steps, and the last value of every column that validation writes."""
    found: Row = {}
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            found |= {name: float(value) for name, value in row.items() if value and name.startswith(("val/", "train/"))}
            found["steps"] = int(row["step"])
    return found


def evaluated(table: Table) -> Row:
    """A column per cell, and their mean under the task's name; the mean of whatever else cells measure; the cells once more for the figure."""
    varies = [axis for axis in table.axes if len({row[axis] for row in table.rows}) > 1]
    cells = {f"{table.metric}, {label({axis: row[axis] for axis in varies})}": row[table.metric] for row in table.rows if varies}
    also = [name for name, value in table.rows[0].items() if isinstance(value, float) and name not in (table.metric, "error", *table.axes)]
    means = {name: sum(row[name] for row in table.rows) / len(table.rows) for name in also}
    return {table.task: table.mean(), **cells, **means, "cells": [{**table.settings(row), "value": row[table.metric]} for row in table.rows]}


def last_row(file: Path) -> dict[str, str]:
    try:
        with file.open(newline="") as lines:
            return dict(list(csv.DictReader(lines))[-1])
    except (OSError, IndexError, csv.Error):
        return {}


def why(log: Path, code: int) -> str:
    """One line: the last that names an error, or else the last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if ERROR.match(line)]
    said = (named or lines or ["it said nothing"])[-1]
    return f"killed by signal {-code}{' (out of memory?)' if code == -9 else ''}: {said}" if code < 0 else said
