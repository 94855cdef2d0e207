"""`memarch ablate FILE`: runs what is not done, then the table and the figure. Exit status 1 when a run failed."""

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from memarch.commands.screen import console, count, size, working


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="an ablation: base, set, grid, seeds, metric (docs/ablations.md)")
    parser.add_argument("--out", help="where runs and results are kept (default: runs/ablations/<name of the file>)")
    parser.add_argument("--processes", type=int, default=1, help="runs at the same time, one thread each unless OMP_NUM_THREADS says more (default: 1)")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="a variant, a run, or a shell pattern; may be given again")
    parser.add_argument("--print", action="store_true", help="show the plan, and run nothing")
    parser.add_argument("--slurm", metavar="SCRIPT", help="write a job-array script for what is not done, and run nothing ('-': to stdout)")
    parser.add_argument("--pdf", action="store_true", help="the figure as PDF too")


def run(args: argparse.Namespace) -> int:
    from memarch.ablation import Runner, load, run_plan, shown, summary, write
    from memarch.config import require

    require(args.processes >= 1, f"--processes {args.processes}: at least 1.")
    whole = load(args.file)
    some = whole.only(args.only)
    out = Path(args.out) if args.out else Path("runs", "ablations", whole.name)
    runner = Runner(whole, out.resolve())
    if args.print:
        return show_plan(some, runner)
    if args.slurm:
        return write_slurm(args, some, runner, out)
    screen = Screen(some, runner)
    with working(whole.name, len(some.runs)) as advance:
        run_plan(some, out, args.processes, screen.ended, lambda share: screen.progress(share, advance))
    rows = [row for run in whole.runs if (row := runner.result(run))]
    done = [row for row in rows if row["status"] == "done"]
    complete = len(done) == len(whole.runs) or not args.only
    files = write(whole, rows, out, results=complete, pdf=args.pdf)
    if done and complete:
        console().print(grid(shown(whole, done)))
        print("mean ± standard deviation over the n seeds that are done")
    print(summary(rows, whole))
    for file in files:
        console().print(f"written: {file}", style="dim", soft_wrap=True)
    return 1 if any(row["status"] == "failed" for run in some.runs if (row := runner.result(run))) else 0


class Screen:
    """What is said while runs go on: a bar on a terminal, and a line for every run that ends."""

    def __init__(self, plan: Any, runner: Any):
        self.total = sum(runner.status(run) != "done" for run in plan.runs)
        self.before = float(len(plan.runs) - self.total)
        self.shown, self.over, self.began, self.share = 0.0, 0, time.monotonic(), 0.0
        if self.before:
            print(f"{int(self.before)} of {len(plan.runs)} runs are done already", file=sys.stderr)

    def ended(self, run: Any, row: dict[str, Any] | None) -> None:
        self.over += 1
        what = "another command is at it" if row is None else row["status"] + (f": {row['error']}" if row["error"] else f", {row['cpu_seconds']:.0f} CPU s")
        print(f"[{self.over}/{self.total}] {run.name}: {what}{self.left()}", file=sys.stderr)

    def progress(self, share: float, advance: Any) -> None:
        self.share = max(share, self.share)
        advance(self.before + self.share - self.shown)
        self.shown = self.before + self.share

    def left(self) -> str:
        share = max(self.share, float(self.over))
        if share >= self.total:
            return ""
        seconds = (time.monotonic() - self.began) * (self.total - share) / share
        return f"; about {seconds / 60:.0f} min to go" if seconds >= 90 else f"; about {seconds:.0f} s to go"


def grid(rows: list[dict[str, str]]) -> Table:
    """A row leaves empty what it does not have: lengths, say, that hold fewer pairs than it asks for."""
    table, names = Table(box=box.SIMPLE_HEAD), list(dict.fromkeys(name for row in rows for name in row))
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*(row.get(name, "") for name in names))
    return table


def show_plan(plan: Any, runner: Any) -> int:
    rows = []
    for run in plan.runs:
        state = f"grows: {run.bytes_per_token} B/token" if run.bytes_per_token else size(run.state_bytes)
        about = {key: str(value) for key, value in run.settings().items() if key != "variant" or plan.config.set}
        rows.append({**about, "parameters": count(run.parameters), "state": state, "status": runner.status(run), "run": run.name})
    console().print(grid(rows))
    print(f"{len(rows)} runs; every config decodes and builds")
    return 0


def write_slurm(args: argparse.Namespace, plan: Any, runner: Any, out: Path) -> int:
    """One array task per run. When all are over, the same command without --only writes table and figure."""
    todo = [run.name for run in plan.runs if runner.status(run) != "done"]
    again = f"{shlex.quote(sys.executable)} -m memarch ablate {shlex.quote(str(Path(args.file).resolve()))} --out {shlex.quote(str(out.resolve()))}"
    text = f"""#!/bin/bash
#SBATCH --job-name={shlex.quote(plan.name)}
#SBATCH --array=0-{len(todo) - 1}
#SBATCH --output={out.resolve()}/slurm-%A_%a.txt
#SBATCH --cpus-per-task=1
# Add what your cluster wants: partition, time, --gres=gpu:1. When all tasks are over, table and figure:
#   {again}
set -eu
runs=(
{chr(10).join("  " + shlex.quote(name) for name in todo)}
)
exec {again} --only "${{runs[$SLURM_ARRAY_TASK_ID]}}"
"""
    if not todo:
        print("every run is done; there is nothing to submit")
    elif args.slurm == "-":
        print(text, end="")
    else:
        out.mkdir(parents=True, exist_ok=True)  # slurm does not make the folder of its output
        Path(args.slurm).write_text(text)
        print(f"{len(todo)} runs: sbatch {args.slurm}")
    return 0
