"""`make bench`, or `python -m benchmarks [op ...]`: every speed with its baseline in the same run, appended to benchmarks/results.csv.

One thread, process CPU time, providers interleaved (A B A B ...), median and quantiles. What is not right is not timed."""

import argparse
import csv
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import mamba_cases, memory_cases, peers, titans_cases
from benchmarks.cases import FIELDS, Case, decoders, draw, scaling
from benchmarks.cases import cases as linear_cases

RESULTS = Path(__file__).parent / "results.csv"
SCALING = Path(__file__).parent / "scaling.csv"
KEPT = os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" and os.environ.get("MALLOC_MMAP_MAX_") == "0"  # as the Makefile sets them
DEVICE = f"cpu {platform.machine()}" + (", large pages, memory kept" if KEPT else "")
TOKENS = [2**i for i in range(10, 17)]
GROWTH = ("date", "commit", "op", "mode", "shape", "tokens", "ms", "exponent", "threads", "device", "torch")


def cases() -> Iterator[Case]:
    yield from linear_cases()
    yield from memory_cases.cases()
    yield from titans_cases.cases()
    yield from mamba_cases.cases()


def once(call: Any, inputs: list[torch.Tensor], backward: bool) -> float:
    given = [x.detach().requires_grad_(backward) for x in inputs]
    begin = time.process_time()
    y = call(*given)
    if backward:
        y.backward(torch.ones_like(y))
    return (time.process_time() - begin) * 1e3


def right(case: Case) -> None:
    """Every provider computes the same thing, in outputs and, where they are timed, in gradients."""
    found: dict[str, list[torch.Tensor]] = {}
    backward = "fwd+bwd" in case.modes
    for name, call in case.providers.items():
        given = [x.detach().requires_grad_(backward) for x in case.inputs]
        y = call(*given)
        if backward:
            y.backward(draw(*y.shape))  # not that of a sum of squares, which a norm keeps as it is
        found[name] = [y.detach(), *(x.grad for x in given if backward)]
    for name, tensors in found.items():
        for a, b in zip(tensors, found["ours"], strict=True):
            error = (a - b).norm() / b.norm().clamp(min=1e-12)
            if not error < 1e-3:
                raise SystemExit(f"{case.op} {case.shape}: {name!r} and 'ours' differ by {error:.1e}; nothing is timed before that is explained.")


def measure(case: Case, backward: bool, rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in case.providers}
    for call in case.providers.values():
        once(call, case.inputs, backward)
    for _ in range(rounds):
        for name, call in case.providers.items():
            times[name].append(once(call, case.inputs, backward))
    return times


def commit() -> str:
    """With -dirty if anything but the results has changed since."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=RESULTS.parent, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!*.csv")
    return (git("describe", "--always") or "unknown") + ("-dirty" if changed else "")


def growth(rounds: int, ops: list[str]) -> list[dict[str, Any]]:
    """Time over 1k to 64k tokens with the exponent of a fitted power law (1: linear; 0: constant), the least of several times each."""
    rows = []

    def row(op: str, mode: str, shape: str, best: list[float]) -> None:
        exponent = np.polyfit(np.log(TOKENS), np.log(best), 1)[0]
        values = (date.today(), commit(), op, mode, shape, " ".join(map(str, TOKENS)), " ".join(f"{t:.3g}" for t in best), f"{exponent:.3f}")
        rows.append(dict(zip(GROWTH, (*values, 1, DEVICE, torch.__version__), strict=True)))

    def chosen(found: dict[str, Any], what: str) -> Iterator[tuple[str, Any]]:
        items = [(op, x) for op, x in found.items() if not ops or op in ops]
        yield from track(items, what, disable=not sys.stdout.isatty(), transient=True)

    for op, at in chosen(scaling() | titans_cases.scaling() | mamba_cases.scaling(), "growing"):
        for mode in ("fwd", "fwd+bwd"):
            times, shape = dict.fromkeys(TOKENS, math.inf), ""
            for turn in range(rounds + 1):  # all lengths in every round, or the machine's drift becomes an exponent; the first round warms up
                for T in TOKENS:
                    shape, call, inputs = at(T)
                    spent = once(call, inputs, mode != "fwd")
                    times[T] = min(times[T], spent) if turn else times[T]
            row(op, mode, shape, list(times.values()))
    layers = decoders() | titans_cases.family() | mamba_cases.family()
    for op, layer in chosen({f"{name} layer": x for name, x in layers.items()}, "decoding"):
        row(op, "one token after so many", "B=1 D=256 fp32", [decode(layer, T, rounds) for T in TOKENS])
    return rows


@torch.no_grad()
def decode(layer: Any, context: int, rounds: int) -> float:
    """ms for one token, the least over rounds of 50."""
    state, x, times = None, torch.randn(1, 1024, 256), []
    for _ in range(context // 1024):
        state = layer(x, state).state
    for _ in range(rounds):
        begin, now = time.process_time(), state
        for _ in range(50):
            now = layer(x[:, :1], now).state
        times.append((time.process_time() - begin) / 50 * 1e3)
    return min(times)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help="only these ops")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--scaling", action="store_true", help="time over 1k to 64k tokens instead, appended to benchmarks/scaling.csv")
    parser.add_argument("--dry", action="store_true", help="print, and leave results.csv as it is")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.scaling:
        return grow(args)
    chosen = [case for case in cases() if not args.ops or case.op in args.ops]
    if not chosen:
        parser.error(f"no case of {', '.join(args.ops)}; there are {', '.join(sorted({case.op for case in cases()}))}")
    out, rows = Console(width=160), []
    for case in track(chosen, "timing", console=out, disable=not out.is_terminal, transient=True):
        if case.same:
            right(case)
        for mode in case.modes:
            times = measure(case, mode == "fwd+bwd", case.rounds or args.rounds)
            ours = statistics.median(times["ours"])
            for name, found in times.items():
                low, *_, high = statistics.quantiles(found, n=5) if len(found) > 1 else found * 2
                middle = statistics.median(found)
                values = (
                    date.today(),
                    commit(),
                    case.op,
                    mode,
                    case.shape,
                    name,
                    f"{middle:.2f}",
                    f"{low:.2f}",
                    f"{high:.2f}",
                    f"{middle / ours:.2f}",
                    len(found),
                )
                rows.append(dict(zip(FIELDS, (*values, 1, DEVICE, torch.__version__), strict=True)))
    table = Table("op", "mode", "shape", "provider", "ms", "p20 to p80", "times ours", box=None)
    for row in rows:
        table.add_row(row["op"], row["mode"], row["shape"], row["provider"], row["ms"], f"{row['ms_p20']} to {row['ms_p80']}", row["times_ours"])
    out.print(table)
    if peers.absent:
        out.print(f"not installed, so not compared: {', '.join(sorted(peers.absent))} (benchmarks/requirements.txt)")
    if not args.dry:
        append(RESULTS, FIELDS, rows)
        out.print(f"{len(rows)} rows appended to {RESULTS.name}")
    return 0


def grow(args: argparse.Namespace) -> int:
    out, rows = Console(width=160), growth(min(args.rounds, 5), args.ops)
    table = Table("op", "mode", "shape", "ms at 1k, 2k, .. 64k tokens", "exponent", box=None)
    for row in rows:
        table.add_row(row["op"], row["mode"], row["shape"], row["ms"], row["exponent"])
    out.print(table)
    if not args.dry:
        append(SCALING, GROWTH, rows)
    return 0


def append(path: Path, fields: Any, rows: list[dict[str, Any]]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields)
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
