"""`memarch inspect memory RUN`: how a run's sparse memories were used, layer by layer, as a table and a figure."""

import argparse
import json
from pathlib import Path

from memarch.commands.screen import console


def arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    memory = what.add_parser("memory", help="gauges of sparse memories, from the metrics.csv of a training run")
    memory.add_argument("run", metavar="RUN", help="the folder of a run (runs/NAME/TIME), finished or not")
    memory.add_argument("--out", help="where the figure goes (default: memory.png in the folder of the run)")
    memory.add_argument("--pdf", action="store_true", help="the figure as PDF too")
    memory.add_argument("--json", action="store_true", help="for programs: the last value of every gauge")


def run(args: argparse.Namespace) -> None:
    from rich import box
    from rich.table import Table

    from memarch.callbacks.metrics import FILE
    from memarch.evaluation.gauges import courses, draw
    from memarch.evaluation.plots import save

    found = courses(Path(args.run) / FILE)
    last: dict[str, dict[str, float]] = {}
    for course in found:
        last.setdefault(course.layer, {})[course.gauge] = course.values[-1]
    files = save(draw(found), Path(args.out or Path(args.run) / "memory.png"), args.pdf)
    if args.json:
        print(json.dumps(last, indent=1))
        return
    gauges = list(dict.fromkeys(course.gauge for course in found))
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("layer or table", no_wrap=True)
    for gauge in gauges:
        table.add_column(gauge, justify="right")
    for layer, values in last.items():
        table.add_row(layer, *(f"{values[gauge]:.3g}" if gauge in values else "" for gauge in gauges))
    console().print(table)
    console().print(f"At step {max(course.steps[-1] for course in found)}. Figure: {', '.join(map(str, files))}")
