"""What the default run shows after training: recall at lengths it never saw, beside the same stack without its memory layer; export, reload,
equality; a stream with a saved state; and a last screen that says what lies where and what to try next."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table as Screen

from memarch import from_pretrained
from memarch import state as states
from memarch.data import MQAR, split_seed
from memarch.evaluation import Table, evaluate
from memarch.evaluation.plots import Line, draw_lines, figure, save
from memarch.generation import generate
from memarch.models.lm import LM

if TYPE_CHECKING:
    from memarch.training import Run

LENGTHS = (32, 64, 128, 256, 512, 1024)
PAIRS = 8


def hello() -> None:
    out = Console(highlight=False)
    out.print("[bold]memarch[/] trains a small memory model on associative recall: pairs are told once, and asked for later.")
    out.print("Two layers, a gated delta memory and an attention window of 8 tokens; rows of 32 and 64 tokens with 4 and 8 pairs.\n")


def tour(run: "Run", again: "Callable[..., Run]") -> None:
    """`again(*flags)` trains once more with flags of the command line. The memory is taken away by one: the pattern of layers."""
    out = Console(highlight=False)
    folder, trained = run.folder, run.data.train
    assert folder is not None and isinstance(trained, MQAR)
    out.print("\nOnce more without the memory: its layer is replaced by a second window, all else stays.", style="bold")
    plain = again("--model.pattern", "WW", "--run.folder", str(folder / "windows-only"), "--run.export", "false").task.model
    export = folder / "export"
    found = ask({"with memory": run.task.model, "windows only": plain}, trained, out)
    picture = draw(found, folder, trained)
    loaded = from_pretrained(export)
    same(run.task.model, loaded)
    out.print(f"\n[bold]Exported, loaded back, equal:[/] {loaded.config.num_params():,} parameters, logits bit for bit the same.", soft_wrap=True)
    stream(loaded, trained, folder, out)
    last(found, folder, picture, export, trained, out)


def ask(models: dict[str, LM], trained: MQAR, out: Console) -> dict[str, Table]:
    lengths = tuple(length for length in LENGTHS if length >= 4 * PAIRS)
    fields: dict[str, Any] = {"lengths": lengths, "pairs": (PAIRS,), "filler": trained.filler, "power": trained.power, "vocab_size": trained.vocab_size}
    found = {}
    with Progress(*Progress.get_default_columns(), console=out, transient=True, disable=not out.is_terminal) as bar:
        task = bar.add_task("asking at lengths it never saw", total=len(models) * len(lengths) * 256)
        for name, model in models.items():
            found[name] = evaluate(model, "mqar", progress=lambda n: bar.advance(task, n), **fields)
    return found


def draw(found: dict[str, Table], folder: Path, trained: MQAR) -> Path:
    """Above: over length. Below: at one unseen length, by how far back the answer stands, where windows end and memory does not."""
    longest, shown = trained.length, 4 * trained.length
    with figure(3.6, panels=2) as (fig, (top, bottom)):
        top.axvspan(min(LENGTHS) / 1.2, longest, color="0.93", linewidth=0)
        middle = (min(LENGTHS) / 1.2 * longest) ** 0.5
        top.annotate(f"trained up\nto {longest}", (middle, 0.5), ha="center", va="center", fontsize=6.5, color="0.4")
        draw_lines(top, [line(name, table.rows, "length") for name, table in found.items()], "length", "accuracy")
        top.set_xlim(min(LENGTHS) / 1.2, None)
        gaps = {name: [row for row in table.parts["gap"] if row["length"] == shown] for name, table in found.items()}
        draw_lines(bottom, [line(name, rows, "gap") for name, rows in gaps.items()], "gap", "accuracy")
        bottom.set_xlabel(f"distance back to the pair (tokens, from), at length {shown}")
        for ax in (top, bottom):
            ax.set_ylabel(f"recall of {PAIRS} pairs")
            ax.set_ylim(0, 1.02)
        file, *_ = save(fig, folder / "recall", pdf=True)
    (folder / "recall.json").write_text(json.dumps({name: table.to_dict() for name, table in found.items()}, indent=2) + "\n")
    return file


def line(name: str, rows: Sequence[Mapping[str, Any]], x: str) -> Line:
    return Line(name, [row[x] for row in rows], [row["accuracy"] for row in rows], [row["error"] for row in rows])


def same(model: LM, loaded: LM) -> None:
    tokens = torch.randint(0, model.config.vocab_size, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if not torch.equal(model.eval()(tokens).logits, loaded(tokens).logits):
            raise AssertionError("the exported model answers differently from the trained one")


def stream(model: LM, trained: MQAR, folder: Path, out: Console) -> None:
    """Pairs are read once and the state is put into a file; then, from the file, every key is asked after a long silence."""
    source = MQAR(settings=((4 * PAIRS, PAIRS),), vocab_size=trained.vocab_size, filler="zero")
    pairs = source.batch(split_seed(1, "test"), [0]).tokens[0, : 2 * PAIRS].view(PAIRS, 2)
    silence = 500
    with torch.no_grad():
        told = model(torch.cat([pairs.flatten(), torch.zeros(silence, dtype=torch.int64)])[None]).state
    file = folder / "state.safetensors"
    states.save(told, file, model)
    told = states.load(file, model)
    answers = [generate(model, [[key]], max_new_tokens=1, state=told).tokens[0][0] for key, _ in pairs.tolist()]
    size = f"{states.nbytes(told):,} bytes at any length"
    out.print(f"\n[bold]Streamed:[/] {PAIRS} pairs told, {silence} tokens of silence, the state ({size}) saved and loaded; then asked:", soft_wrap=True)
    marks = [f"{key}→{answer}{'' if answer == value else f' [red](was {value})[/]'}" for (key, value), answer in zip(pairs.tolist(), answers, strict=True)]
    out.print("  " + "  ".join(marks))


def last(found: dict[str, Table], folder: Path, picture: Path, export: Path, trained: MQAR, out: Console) -> None:
    lengths = [row["length"] for row in next(iter(found.values())).rows]
    screen = Screen("recall of 8 pairs at length", *[f"{n}{'' if n in [s[0] for s in trained.settings] else '*'}" for n in lengths], title=None)
    for name, table in found.items():
        screen.add_row(name, *[f"{row['accuracy']:.3f}" for row in table.rows])
    out.print()
    out.print(screen)
    out.print("* longer than anything seen in training\n")
    for label, what in (
        ("figure", picture),
        ("model", f"{export}   memarch.from_pretrained({str(export)!r})"),
        ("numbers", f"{folder / 'metrics.csv'}, {folder / 'recall.json'}"),
    ):
        out.print(f"  {label:<8} {what}", soft_wrap=True)
    out.print("\n[bold]Next[/]")
    here = "" if shutil.which("memarch") else f"{os.path.relpath(Path(sys.executable).parent)}/"
    for command, why in (
        (f"{here}memarch evaluate {export} --task mqar --lengths 512 1024 --pairs 4 16", "ask more of this model"),
        (f"{here}python train.py fit --config configs/recall/hybrid.yaml --model.parts.G.mixer.heads 4", "change any part from the command line"),
        (f"{here}memarch ablate configs/ablations/recall_memory.yaml", "which part does it? seeds, mean and spread"),
        (f"{here}memarch list", "every model there is"),
    ):
        out.print(f"  {command}\n      {why}", soft_wrap=True, style=None)
