"""What happened inside a model.

`memarch inspect memory RUN`: how a run's sparse memories were used, layer by layer, as a table and a figure.
`memarch inspect fidelity MODEL`: what is left of a token in the last layer, and of a layer in a later one: tables, and JSON, CSV and a figure in a folder.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from memarch.commands import load
from memarch.commands.evaluate import default_folder
from memarch.commands.screen import console, working

FIELDS = ("split", "tokens", "distances", "gaps", "temperature", "ridge")  # of Fidelity, that are options of the same name


def arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    words = what.add_parser("memory", help="gauges of sparse memories, from the metrics.csv of a training run")
    words.add_argument("run", metavar="RUN", help="the folder of a run (runs/NAME/TIME), finished or not")
    words.add_argument("--out", help="where the figure goes (default: memory.png in the folder of the run)")
    words.add_argument("--pdf", action="store_true", help="the figure as PDF too")
    words.add_argument("--json", action="store_true", help="for programs: the last value of every gauge")

    words = what.add_parser("fidelity", help="ETMF and ECLMF of a model, as published and corrected")
    load.arguments(words)
    words.add_argument("--path", help="a text file, a folder of them, or of token shards (default: the data of the run; else the standard library)")
    words.add_argument("--split", choices=("train", "val", "test"), help="of the data (default: val)")
    words.add_argument("--tokens", type=int, metavar="N", help="read so many (default: 32768)")
    words.add_argument("--distances", type=int, nargs="+", metavar="D", help="of ETMF, in tokens (default: 0 8 16 32)")
    words.add_argument("--gaps", type=int, nargs="+", metavar="G", help="of ECLMF, in blocks (default: 1 2 5 10, as far as the model goes)")
    words.add_argument("--temperature", type=float, metavar="X", help="of the softmax in ETMF (default: 1)")
    words.add_argument("--ridge", type=float, metavar="X", help="of the fit in ECLMF (default: 1e-4)")
    words.add_argument("--batch-size", type=int, help="documents at once: speed and memory, no number")
    words.add_argument("--chunk", type=int, help="tokens at once, the state carried between: speed and memory, no number")
    words.add_argument("--out", help="folder for JSON, CSV and figure (default: evaluation/ in the model's folder, or here)")
    words.add_argument("--pdf", action="store_true", help="the figure as PDF too")


def run(args: argparse.Namespace) -> None:
    {"memory": memory, "fidelity": fidelity}[args.what](args)


def memory(args: argparse.Namespace) -> None:
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


def fidelity(args: argparse.Namespace) -> None:
    from rich import box
    from rich.table import Table

    from memarch.evaluation import evaluate, make_task
    from memarch.evaluation.fidelity import FORMS, Fidelity
    from memarch.evaluation.report import show, write

    data, said = data_of(args)
    given = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    probe = make_task(Fidelity(data=data), **given)
    model = load.load(args)
    with working("fidelity", probe.work(model)) as advance:
        table = evaluate(model, probe, batch_size=args.batch_size, chunk=args.chunk, progress=advance)
    out = console()
    out.print(said, style="dim")
    show(table, out)
    if "ECLMF" in table.parts:
        title = f"fidelity: ECLMF, mean over blocks ({table.about['states']} tokens, width {model.config.dim})"
        grid = Table("apart", box=box.SIMPLE_HEAD, title=title, title_justify="left")
        for form in FORMS.values():
            grid.add_column(form, justify="right", no_wrap=True)
        for row in table.parts["ECLMF"]:
            grid.add_row(str(row["apart"]), *(f"{row[form]:.3f}" for form in FORMS))
        out.print(grid)
    folder = Path(args.out) if args.out else default_folder(args.model)
    for file in write(table, folder, pdf=args.pdf):
        out.print(f"written: {file}", style="dim", soft_wrap=True)


def data_of(args: argparse.Namespace) -> tuple[Any, str]:
    """What is read, and a sentence about it: --path, the data of the run that trained the model, or the text that every machine has."""
    from memarch.config import decode
    from memarch.data import DataConfig, Text
    from memarch.evaluation import TextTask

    if args.path:
        return TextTask(path=args.path).source(), f"Read: {args.path}."
    if train := load.training_data(args.model):
        return decode(DataConfig, train, f"{args.model}: data.train"), f"Read: {train['kind']}, the data of the run."
    return Text(), "Read: the standard library of this Python."
