"""What the default run shows after training: recall at lengths it never saw, beside the same stack without its memory layer; export, reload,
equality; a stream with a saved state; and a last screen that says what lies where and what to try next."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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

LENGTHS = (32, 64, 128, 256, 512, 1024)
PAIRS = 8


def tour(model: LM, plain: LM, folder: Path, trained: MQAR, export: Path) -> None:
    """`model` as it was trained, and `plain`: the same stack, trained the same way, with its memory layer replaced by a second window."""
    out = Console(highlight=False)
    found = ask({"with memory": model, "windows only": plain}, trained, out)
    picture = draw(found, folder, trained)
    loaded = from_pretrained(export)
    same(model, loaded)
    out.print(f"\n[bold]exported, loaded back and equal[/]: {export}, {loaded.config.num_params():,} parameters, logits bit for bit the same")
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
    out.print(f"\n[bold]streamed[/]: {PAIRS} pairs told, {silence} tokens of silence, the state ({size}) saved and loaded; then asked:")
    marks = [f"{key}→{answer}{'' if answer == value else f' [red](was {value})[/]'}" for (key, value), answer in zip(pairs.tolist(), answers, strict=True)]
    out.print("  " + "  ".join(marks))


def last(found: dict[str, Table], folder: Path, picture: Path, export: Path, trained: MQAR, out: Console) -> None:
    lengths = [row["length"] for row in next(iter(found.values())).rows]
    screen = Screen("recall of 8 pairs at length", *[f"{n}{'' if n in [s[0] for s in trained.settings] else '*'}" for n in lengths], title=None)
    for name, table in found.items():
        screen.add_row(name, *[f"{row['accuracy']:.3f}" for row in table.rows])
    out.print()
    out.print(screen)
    out.print("* never seen in training. windows only: the same stack and training, its memory layer replaced by a second window of 16.\n")
    for label, what in (
        ("figure", picture),
        ("model", f"{export}   memarch.from_pretrained({str(export)!r})"),
        ("numbers", f"{folder / 'metrics.csv'}, {folder / 'recall.json'}"),
    ):
        out.print(f"  {label:<8} {what}", soft_wrap=True)
    out.print("\n[bold]next[/]")
    for command, why in (
        (f"memarch evaluate {export} --task mqar --lengths 512 2048 --pairs 4 8 16", "ask more of this model"),
        ("python train.py fit --config configs/recall/hybrid.yaml --model.parts.G.mixer.heads 4", "change any part from the command line"),
        ("memarch ablate configs/ablations/recall_memory.yaml", "which part does it? seeds, mean and spread"),
        ("memarch list", "every model there is"),
    ):
        out.print(f"  {command}\n      {why}", soft_wrap=True, style=None)
