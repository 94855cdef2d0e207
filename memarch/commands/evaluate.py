"""`memarch evaluate MODEL --task mqar --lengths 64 512 --pairs 4 8`: a table, and JSON, CSV and a figure in a folder.

The options of a task are the fields of its config, so there is no list of them to keep here. What decides the numbers and is not said comes from
the run that trained the model, if its folder is there: a model that learned with zero filler is asked with zero filler.
"""

import argparse
import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memarch.commands import load
from memarch.commands.screen import console, working
from memarch.config import ConfigError, allowed

DECIDED_BY_DATA = ("vocab_size", "filler", "power", "needles", "value_len", "facts", "asked", "key_length", "world", "sets", "every", "noise")


def arguments(parser: argparse.ArgumentParser) -> None:
    from memarch.evaluation import TASKS

    load.arguments(parser)
    parser.add_argument("--task", required=True, help=f"{', '.join(TASKS)}; or a whole task as JSON, as an ablation file has it under `metric`")
    parser.add_argument("--batch-size", type=int, help="rows at once: speed and memory, no number")
    parser.add_argument("--chunk", type=int, help="tokens at once, the state carried between: speed and memory, no number")
    parser.add_argument("--out", help="folder for JSON, CSV and figure (default: evaluation/ in the model's folder, or here)")
    parser.add_argument("--pdf", action="store_true", help="the figure as PDF too")
    settings = parser.add_argument_group("what is asked", "the tasks that have the option, each with its default")
    for name, (words, owners) in options().items():
        about = "; ".join(f"{task}{f': {default}' if default else ''}" for task, default in owners.items())
        settings.add_argument(f"--{name.replace('_', '-')}", dest=f"task_{name}", help=about, **words)


def options() -> dict[str, tuple[dict[str, Any], dict[str, str]]]:
    """Every field of every task, as argparse takes it, and its default for every task that has it."""
    from memarch.evaluation import TASKS

    found: dict[str, tuple[dict[str, Any], dict[str, str]]] = {}
    for task, cls in TASKS.items():
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if field.name != "kind":
                default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else "" if field.default is None else str(field.default)
                found.setdefault(field.name, (_words(hints[field.name]), {}))[1][task] = default
    return found


def _words(hint: Any) -> dict[str, Any]:
    args = [arg for arg in typing.get_args(hint) if arg not in (type(None), Ellipsis)]
    if typing.get_origin(hint) is tuple:
        return {"type": args[0], "nargs": "+", "metavar": "N"}
    if typing.get_origin(hint) is typing.Literal:
        return {"choices": args}
    return {"type": args[0] if args else hint, "metavar": "N" if (args or [hint])[0] is not str else "WORD"}


def run(args: argparse.Namespace) -> None:
    from memarch.evaluation import evaluate
    from memarch.evaluation.report import show, write

    task, said = task_of(args)
    model = load.load(args)
    with working(task.kind, task.work(model)) as advance:
        table = evaluate(model, task, batch_size=args.batch_size, chunk=args.chunk, progress=advance)
    out = console()
    if said:
        out.print(said, style="dim")
    show(table, out)
    folder = Path(args.out) if args.out else default_folder(args.model)
    for file in write(table, folder, pdf=args.pdf):
        out.print(f"written: {file}", style="dim", soft_wrap=True)


def task_of(args: argparse.Namespace) -> tuple[Any, str]:
    """The task, and a sentence about what was taken over from the training run."""
    from memarch.evaluation import TASKS, make_task

    given = {name.removeprefix("task_"): value for name, value in vars(args).items() if name.startswith("task_") and value is not None}
    if args.task.lstrip().startswith("{"):
        try:
            task = json.loads(args.task)
        except json.JSONDecodeError as error:
            raise ConfigError(f"--task: not JSON ({error}). A task is {{'kind': 'mqar', 'lengths': [64, 512]}} with double quotes, or a name.") from None
        return make_task(task, **given), ""
    if args.task not in TASKS:
        raise ConfigError(allowed("task", args.task, TASKS))
    fields = {field.name for field in dataclasses.fields(TASKS[args.task])}
    for name in given:
        if name not in fields:
            known = ", ".join(f"--{field.replace('_', '-')}" for field in sorted(fields - {"kind"}))
            raise ConfigError(f"--{name.replace('_', '-')} is not for {args.task}, which takes {known}.")
    taken = {name: value for name, value in trained_on(args.model, args.task).items() if name in fields and name not in given}
    said = f"As in training: {', '.join(f'{name} {value}' for name, value in taken.items())}." if taken else ""
    return make_task(args.task, **{**taken, **given}), said


def trained_on(model: str, task: str) -> Mapping[str, Any]:
    """What the run beside the export learned from, if it was the same kind of data."""
    train = load.training_data(model)
    return {name: train[name] for name in DECIDED_BY_DATA if train.get(name) is not None} if train.get("kind") == task else {}


def default_folder(model: str) -> Path:
    folder = Path(load.folder_of(model)).expanduser()
    return folder / "evaluation" if folder.is_dir() else Path("evaluation")
