"""`memarch list`: named models with their sizes. Everything is counted on the meta device, where the largest model costs nothing."""

import argparse
import difflib
import json
from typing import NamedTuple

from rich import box
from rich.table import Table

from memarch.commands.screen import console, count, size

TRAINING = ("optimizer_bytes", "optimizer_bytes_row")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pattern", nargs="?", default="*", help="a part of a name, or a shell pattern such as '*-tiny'")
    parser.add_argument("--training", action="store_true", help="also what the optimiser keeps: two moments a weight, and less with optim.tables row")
    parser.add_argument("--json", action="store_true", help="for programs: bytes and counts as plain numbers")


def run(args: argparse.Namespace) -> None:
    rows = [describe(name) for name in find(args.pattern)]
    if args.json:
        print(json.dumps([{key: value for key, value in row._asdict().items() if args.training or key not in TRAINING} for row in rows], indent=1))
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("name", no_wrap=True)
    for title in ("parameters", "active", "state, batch 1", *(["AdamW", "tables: row"] if args.training else [])):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("family")
    table.add_column("paper", overflow="fold")
    for row in rows:
        table.add_row(
            row.name,
            count(row.parameters),
            count(row.active_parameters),
            state_words(row),
            *([size(row.optimizer_bytes), row_words(row)] if args.training else []),
            row.family,
            row.paper,
        )
    console().print(table)


def find(pattern: str) -> list[str]:
    from memarch.config import ConfigError
    from memarch.models import list_models

    found = list_models(pattern if any(c in pattern for c in "*?[") else f"*{pattern}*")
    if not found:
        near = difflib.get_close_matches(pattern, list_models(), n=1)
        raise ConfigError(f"no model matches {pattern!r}.{f' Did you mean {near[0]!r}?' if near else ''} memarch list prints all names.")
    return found


class Description(NamedTuple):
    name: str
    parameters: int
    active_parameters: int
    state_bytes: int  # of one row; of a growing state, before the first token
    bytes_per_token: int  # 0: the state is bounded
    optimizer_bytes: int  # optim.tables dense or lazy
    optimizer_bytes_row: int  # optim.tables row
    family: str
    paper: str


def describe(name: str) -> Description:
    from memarch.evaluation.size import state_size
    from memarch.models import PRESETS, create_model
    from memarch.optim import OptimConfig, kept

    model = create_model(name, device="meta")
    config = model.config
    dense, row = kept(model, OptimConfig()), kept(model, OptimConfig(tables="row"))
    return Description(name, config.num_params(), config.active_params(), *state_size(model), dense, row, PRESETS[name].family, PRESETS[name].paper)


def state_words(row: Description) -> str:
    return f"grows: {row.bytes_per_token} B/token" if row.bytes_per_token else size(row.state_bytes)


def row_words(row: Description) -> str:
    return "" if row.optimizer_bytes_row == row.optimizer_bytes else size(row.optimizer_bytes_row)
