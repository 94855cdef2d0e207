"""Runs of a plan, each in processes of its own: training, then the evaluation if the metric is one. What is done is not done again.

    out/runs/<name>/   run.yaml    what `memarch train` is given
                       log.txt     what it said
                       result.json its row, written when it ends, well or badly
                       ...         the run's own folder: metrics.csv, checkpoints/, export/, evaluation/

A run is done when its result says so for the same config and the same metric. One that was stopped goes on from its checkpoint; one that failed
is tried again. A lock per run lets several commands, on several machines that share a disk, work on one plan.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import yaml

from memarch.ablation.folder import GIVEN, LOG, evaluated, given, last_row, measured, save, saved, why
from memarch.ablation.plan import Plan, Run
from memarch.config import digest, encode
from memarch.evaluation.report import read
from memarch.evaluation.table import Row


class Stop(Exception):
    """The whole command was told to stop."""


@dataclass
class Runner:
    """`execute(run)` brings one run to its end and returns its row. Threads may share a runner."""

    plan: Plan
    out: Path
    devices: "SimpleQueue[str | None]" = field(default_factory=SimpleQueue)  # one entry for every process that may run at once
    children: set[int] = field(default_factory=set)
    stopping: threading.Event = field(default_factory=threading.Event)

    def folder(self, run: Run) -> Path:
        return self.out / "runs" / run.name

    @property
    def asked(self) -> str:
        metric, part = encode(self.plan.config.metric), self.plan.config.part
        return digest(metric if part is None else [metric, part])

    def result(self, run: Run) -> Row | None:
        """The row of a run, whatever its status; None when there is none for this config and metric."""
        found = saved(self.folder(run))
        same = found is not None and found.get("config") == run.digest and found.get("asked") == self.asked
        return found if same else None

    def status(self, run: Run) -> str:
        """done, failed, stopped (it goes on where it was), or to do."""
        found = self.result(run)
        if found is not None:
            return found["status"]
        return "stopped" if any(self.folder(run).glob("checkpoints/*")) else "to do"

    def execute(self, run: Run) -> Row | None:
        """None: another command is at it."""
        folder = self.folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / ".lock") as mine:
            if not mine:
                return None
            if (found := self.result(run)) and found["status"] == "done":
                return found
            before = saved(folder) or {}
            before = before if before.get("config") == run.digest else {}
            row: Row = {
                "status": "stopped",
                "error": "stopped from outside; it goes on the next time",
                "trained": before.get("trained", False),
                **run.settings(),
                "run": run.name,
                "config": run.digest,
                "asked": self.asked,
                "parameters": run.parameters,
                "state_bytes": run.state_bytes,
                "bytes_per_token": run.bytes_per_token,
                "cpu_seconds": before.get("cpu_seconds", 0.0),
            }
            device = self.devices.get()
            try:
                self.work(run, folder, row, device)
            except (OSError, ValueError, KeyError) as error:  # files that should be there and are not: this run's failure, not the others'
                row |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
            finally:
                self.devices.put(device)
                save(folder, row)
            return row

    def work(self, run: Run, folder: Path, row: Row, device: str | None) -> None:
        """Fill the row. A failure is a row too."""
        (folder / GIVEN).write_text(yaml.safe_dump(given(run, folder), sort_keys=False))
        task = self.plan.config.task()
        commands = {
            "train": ["train", "fit", "--config", str(folder / GIVEN)],
            "evaluate": ["evaluate", str(folder / "export"), "--task", json.dumps(encode(task)), "--out", str(folder / "evaluation")],
        }
        with (folder / LOG).open("w") as log:
            for name, words in commands.items():
                if (name == "train" and row["trained"]) or (name == "evaluate" and task is None):
                    continue
                code, seconds = self.process(words, log.fileno(), device)
                row["cpu_seconds"] = round(row["cpu_seconds"] + seconds, 2)
                if self.stopping.is_set():
                    raise Stop
                if code != 0:
                    row |= {"status": "failed", "error": why(folder / LOG, code)}
                    return
                row["trained"] = True
        row |= measured(folder)
        if task is not None:
            row |= evaluated(self.plan.config.cells(read(folder / "evaluation" / f"{task.kind}.json")))
        elif self.plan.config.metric not in row:
            have = ", ".join(name for name in row if name.startswith(("val/", "train/")))
            row |= {"status": "failed", "error": f"metrics.csv has no {self.plan.config.metric!r}; it has {have or 'none'}"}
            return
        row |= {"status": "done", "error": ""}

    def process(self, words: list[str], log: int, device: str | None) -> tuple[int, float]:
        """Exit status and CPU seconds of one `memarch` command."""
        env = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", **os.environ, "MPLBACKEND": "Agg"}
        env |= {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
        if self.stopping.is_set():
            raise Stop
        child = subprocess.Popen([sys.executable, "-m", "memarch", *words], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env)
        self.children.add(child.pid)
        try:
            if not hasattr(os, "wait4"):
                return child.wait(), 0.0
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            return child.returncode, usage.ru_utime + usage.ru_stime
        finally:
            self.children.discard(child.pid)

    def stop(self) -> None:
        """Tell all children; training then saves a checkpoint before it leaves."""
        self.stopping.set()
        for pid in list(self.children):
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:
                continue

    def share(self, run: Run) -> float:
        """How much of a run is done, from 0 to 1: the last step in metrics.csv."""
        most = run.config["trainer"].get("max_steps") or 0
        last = last_row(self.folder(run) / "metrics.csv").get("step") or 0
        return min(1.0, float(last) / most) if most > 0 else 0.0


Ended = Callable[[Run, Row | None], None]


def run_plan(plan: Plan, out: Path, processes: int = 1, ended: Ended | None = None, progress: Callable[[float], None] | None = None) -> list[Row]:
    """All runs that are not done. `ended` hears of each; `progress` hears once a second how many runs are done, parts counted."""
    runner = Runner(plan, out.resolve())
    for device in slots(processes):
        runner.devices.put(device)
    todo = [run for run in plan.runs if runner.status(run) != "done"]
    rows = {run.name: row for run in plan.runs if (row := runner.result(run))}
    with interruptible(), ThreadPoolExecutor(processes) as pool:
        waiting: dict[Future[Row | None], Run] = {pool.submit(runner.execute, run): run for run in todo}
        over = 0
        try:
            while waiting:
                done, _ = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                for future in done:
                    run = waiting.pop(future)
                    row = future.result()
                    over += 1
                    if row is not None:
                        rows[run.name] = row
                    if ended:
                        ended(run, row)
                if progress:
                    progress(over + sum(runner.share(run) for future, run in waiting.items() if future.running()))
        except BaseException:
            runner.stop()
            for future in waiting:
                future.cancel()
            raise
    return [rows[run.name] for run in plan.runs if run.name in rows]


def slots(processes: int) -> list[str | None]:
    """Which GPU each process sees: they take turns when there are several."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    return [gpus[i % len(gpus)] if len(gpus) > 1 else None for i in range(processes)]


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM, which schedulers send, ends the command as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def lock(file: Path) -> Iterator[bool]:
    """Whether nobody else holds it. The system lets go when a process dies, however it dies."""
    try:
        import fcntl
    except ImportError:  # no such locks: one command at a time, then
        yield True
        return
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True
