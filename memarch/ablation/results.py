"""Rows of runs into runs.csv, the table with mean and spread, and the figure."""

import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from memarch.ablation.plan import COSTS as RUN_COSTS
from memarch.ablation.plan import Plan
from memarch.evaluation.report import write_csv
from memarch.evaluation.table import Row, label

HIDDEN = ("cells", "asked", "trained")  # kept in result.json
COLUMN = {"state_bytes": "state"}  # what the figure calls it, in KiB
COSTS = ("parameters", "state_bytes", "bytes_per_token", "cpu_seconds", "steps")


def write(plan: Plan, rows: Sequence[Row], out: Path, *, results: bool = True, pdf: bool = False) -> list[Path]:
    """runs.csv with every run; with `results` also table.csv and plot.png, as far as runs are done."""
    out.mkdir(parents=True, exist_ok=True)
    files = [replace_csv(out / "runs.csv", [ordered(row, plan) for row in rows])]
    done = [row for row in rows if row["status"] == "done"]
    if done and results:
        from memarch.evaluation import plots

        files.append(replace_csv(out / "table.csv", table(plan, done)))
        figure = plots.compare(
            placed(plan, done), x="state" if plan.config.x == "state_bytes" else plan.config.x, group=plan.config.group, metric=metric_name(plan)
        )
        files += plots.save(figure, out / "plot.png", pdf)
    return files


def replace_csv(file: Path, rows: Sequence[Row]) -> Path:
    """At no moment half a file: several commands may write it, and each writes all rows it finds."""
    beside = write_csv(file.with_name(f".{file.name}.{os.getpid()}"), rows)
    os.replace(beside, file)
    return file


def ordered(row: Row, plan: Plan) -> Row:
    """What the run is, what came out, what it cost, how it ended."""
    head = [*(["variant"] if plan.config.set else []), *plan.config.grid, "seed"]
    tail = [*COSTS, "run", "config", "status", "error"]
    middle = [name for name in row if name not in (*head, *tail, *HIDDEN, "variant")]
    return {name: row.get(name) for name in [*head, *middle, *tail]}


def metrics(plan: Plan, rows: Iterable[Row]) -> list[str]:
    """The columns to average: the metric asked for first, then whatever else validation or the evaluation said."""
    task, asked = plan.config.task(), plan.config.metric
    first = task.kind if task else str(asked)
    found = dict.fromkeys(name for row in rows for name in ordered(row, plan) if isinstance(row.get(name), float) and name not in (*COSTS, *plan.config.grid))
    return [first, *(name for name in found if name != first and not name.startswith("train/"))]


def metric_name(plan: Plan) -> str:
    return plan.config.column()


def table(plan: Plan, done: Sequence[Row]) -> list[Row]:
    """One row per variant and grid point: n, then mean and standard deviation over seeds of every metric, then mean costs."""
    places = ["variant", *plan.config.grid]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in done:
        groups.setdefault(tuple(row[name] for name in places), []).append(row)
    found = []
    for place, rows in groups.items():
        line: Row = {**dict(zip(places, place, strict=True)), "n": len(rows)}
        if not plan.config.set:
            del line["variant"]
        for name in metrics(plan, done):
            values = [row[name] for row in rows if name in row]
            line[name] = statistics.fmean(values) if values else None
            line[f"{name} std"] = statistics.stdev(values) if len(values) > 1 else None
        found.append({**line, **{name: statistics.fmean(row[name] for row in rows) for name in COSTS if all(name in row for row in rows)}})
    return found


def shown(plan: Plan, done: Sequence[Row]) -> list[dict[str, str]]:
    """The table as people read it: a row per variant and grid point, and a column per length (or whatever the evaluation's first axis is)."""
    flat = points(plan, done, all_dimensions=True)
    across = next((name for name in plan.config.axes() if len({point[name] for point in flat}) > 1), None)
    varies = {name for name in flat[0] if len({point[name] for point in flat}) > 1}
    places = [name for name in flat[0] if name in varies - {across, "value"}] or ["variant"]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for point in flat:
        groups.setdefault(tuple(point[name] for name in places), []).append(point)
    found = []
    for place, group in groups.items():
        line = {name: str(value) for name, value in zip(places, place, strict=True)}
        values: dict[str, list[float]] = {}
        for point in group:
            values.setdefault(metric_name(plan) if across is None else f"{across} {point[across]:g}", []).append(point["value"])
        line["n"] = str(max(map(len, values.values())))
        found.append(line | {name: spread(statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else None) for name, v in values.items()})
    return found


def spread(mean: float | None, std: float | None) -> str:
    if mean is None:
        return ""
    return f"{mean:.3f}" if std is None else f"{mean:.3f} ±{f'{std:.3f}'.removeprefix('0')}"


def points(plan: Plan, done: Sequence[Row], *, all_dimensions: bool = False) -> list[Row]:
    """One per run, or per run and cell of the evaluation: its place in every dimension (that varies), and the value."""
    task = plan.config.task()
    flat = []
    for row in done:
        place = {name: row[name] for name in ("variant", *plan.config.grid)}
        cells = row["cells"] if task else [{"value": row[str(plan.config.metric)]}]
        flat += [{**place, **cell} for cell in cells]
    if all_dimensions:
        return flat
    varies = [name for name in flat[0] if name != "value" and len({point[name] for point in flat}) > 1]
    return [{name: point[name] for name in (*varies, "value")} for point in flat]


def placed(plan: Plan, done: Sequence[Row]) -> list[Row]:
    """The points as the figure wants them: with what a run costs as a place of its own, and families in the place of variants."""
    x, family = plan.config.x, plan.config.group == "family"
    runs = [row for row in done for _ in (row["cells"] if plan.config.task() else [0])]
    found = []
    for point, row in zip(points(plan, done), runs, strict=True):
        if family:
            point = {"family": row["variant"].partition(" / ")[0], **{name: value for name, value in point.items() if name != "variant"}}
        if x == "state_bytes":
            point[COLUMN[x]] = (row["state_bytes"] + row["bytes_per_token"] * longest(plan)) / 1024
        elif x in RUN_COSTS:
            point[x] = row[x]
        found.append(point)
    return found


def longest(plan: Plan) -> int:
    """Tokens of the longest input of the evaluation: a state that grows is as large as that makes it."""
    lengths = getattr(plan.config.task(), "lengths", None)
    return max(lengths) if lengths else 0


def summary(rows: Sequence[Row], plan: Plan) -> str:
    """How many are done, and what is wrong with the others, one line each."""
    done = sum(row["status"] == "done" for row in rows)
    failed = [f"failed: {label({k: row[k] for k in ('variant', *plan.config.grid, 'seed')})}: {row['error']}" for row in rows if row["status"] == "failed"]
    return "\n".join([f"{done} of {len(plan.runs)} runs done", *failed])
