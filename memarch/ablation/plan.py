"""From one file to all its runs, every one of them decoded and built (without weights) before anything runs.

base: ../recall/default.yaml        a complete run: a path beside this file, configs/..., or the tree itself
set:                                variants by name; what a path names is replaced, nothing is merged
  window: {model.pattern: WW}
  hybrid: {}                        the base as it is
grid:                               every combination
  optim.lr: [3e-3, 1e-2]
seeds: 3                            0, 1, 2; or a list
metric: val/accuracy                a column of metrics.csv, or a task of memarch.evaluation
part: position                      of a task's answers, cut another way: by place in a text; ECLMF.y_held_out is one column of fidelity's ECLMF
x: optim.lr                         for the figure: what runs along it (also state_bytes or parameters),
group: variant                      and what its lines are; family: what stands before " / " in a variant's name
"""

import dataclasses
import inspect
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

import torch

from memarch.arguments import SEEDS, TREES, read
from memarch.config import ConfigError, allowed, decode, digest, encode, override, require
from memarch.evaluation import make_task
from memarch.evaluation.size import state_size
from memarch.evaluation.table import Row, Table
from memarch.models.lm import LM, LMConfig
from memarch.models.presets import preset
from memarch.optim import OptimConfig

GROUPS = ("trainer", "data", "task", "run")
COSTS = ("state_bytes", "parameters")  # what a figure may have along x beside the dimensions
IRRELEVANT = ("name", "root", "folder", "bar", "logger")  # of `run`: where a run is kept and shown decides no number


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    base: str | dict[str, Any]
    set: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    seeds: int | tuple[int, ...] = 1
    metric: str | dict[str, Any] = "val/loss"
    part: str | None = None
    x: str | None = None
    group: str | None = None

    def __post_init__(self) -> None:
        require(len(self.seed_list()) > 0, "seeds: at least one, as a count or a list.")
        require(len(set(self.seed_list())) == len(self.seed_list()), f"seeds {list(self.seed_list())}: one stands twice; equal runs say nothing new.")
        for path, values in self.grid.items():
            require(len(values) > 0, f"grid.{path} is empty: give at least one value.")
        good = isinstance(self.metric, dict) or re.match(r"(val|train)/.", self.metric)
        require(bool(good), f"metric {self.metric!r} must be a column of metrics.csv such as val/loss or val/accuracy, or a task such as {{kind: mqar}}.")
        require(self.part is None or isinstance(self.metric, dict), f"part {self.part!r} is a part of what a task answers; metric {self.metric!r} is none.")
        self.axes()
        for hint, more in (("x", COSTS), ("group", ("family",))):
            name, known = getattr(self, hint), [*self.dimensions(), *more]
            require(name is None or name in known, f"{hint}: {allowed('dimension', name, known)}")

    def seed_list(self) -> Sequence[int]:
        return range(self.seeds) if isinstance(self.seeds, int) else self.seeds

    def task(self) -> Any:
        """The evaluation that measures a run, or None: a column of metrics.csv does."""
        return None if isinstance(self.metric, str) else make_task(self.metric)

    def dimensions(self) -> list[str]:
        """What results differ in: the variant, the grid, and the grid of the evaluation."""
        return [*(["variant"] if self.set else []), *self.grid, *self.axes()]

    def axes(self) -> tuple[str, ...]:
        """What the cells of the evaluation differ in."""
        task = self.task()
        if task is None or self.part is None:
            return () if task is None else tuple(task.grid)
        known, name = getattr(task, "parts", {}), self.part.partition(".")[0]
        require(bool(known), f"part {self.part!r}: {task.kind} answers in cells only; leave part out.")
        require(name in known, f"part: {allowed('part', name, known)}")
        axes: tuple[str, ...] = known[name]
        return axes

    def column(self) -> str:
        """What is measured."""
        task, named = self.task(), (self.part or "").partition(".")[2]
        return str(self.metric) if task is None else named or task.metric

    def cells(self, table: Table) -> Table:
        """Of what an evaluation answered, the cells that are asked for."""
        return table if self.part is None else table.part(self.part.partition(".")[0], self.axes(), self.part.partition(".")[2])


@dataclass(frozen=True)
class Run:
    name: str  # of its folder: what it is, and the digest of its config, so a changed run is another run
    variant: str
    grid: Mapping[str, Any]
    seed: int
    config: Mapping[str, Any]
    digest: str
    parameters: int
    state_bytes: int
    bytes_per_token: int

    def settings(self) -> Row:
        return {"variant": self.variant, **{path: plain(value) for path, value in self.grid.items()}, "seed": self.seed}


@dataclass(frozen=True)
class Plan:
    name: str
    config: AblationConfig
    runs: tuple[Run, ...]

    def only(self, patterns: Sequence[str]) -> "Plan":
        """The runs that a variant, a run's name, or a shell pattern of either names."""

        def hit(run: Run, pattern: str) -> bool:
            return pattern in (run.name, run.variant) or fnmatch(run.name, pattern) or fnmatch(run.variant, pattern)

        for pattern in patterns:
            require(any(hit(run, pattern) for run in self.runs), allowed("run", pattern, {run.name for run in self.runs} | {run.variant for run in self.runs}))
        return self if not patterns else dataclasses.replace(self, runs=tuple(r for r in self.runs if any(hit(r, p) for p in patterns)))


def load(file: Path | str) -> Plan:
    """Read a file and resolve all its runs. Everything that can be wrong in a config is wrong here."""
    path = Path(file)
    data = read(str(file))
    config: AblationConfig = decode(AblationConfig, data, str(file))
    base, where = base_of(config.base, path)
    base = settle(base, where)
    runs = []
    for variant, changes in (config.set or {"base": {}}).items():
        with_set = change(base, changes or {}, f"{file}: set.{variant}")
        for values in itertools.product(*config.grid.values()):
            point = dict(zip(config.grid, values, strict=True))
            with_grid = settle(change(with_set, point, f"{file}: grid"), f"{file}: {label(variant, point)}")
            for seed in config.seed_list():
                runs.append(resolve(variant, point, seed, with_grid, f"{file}: {label(variant, point)}"))
    task = config.task()
    for run in {run.config["model"]["vocab_size"]: run for run in runs}.values():
        if hasattr(task, "plan"):
            task.plan(run.config["model"]["vocab_size"])  # says so now if no cell of the evaluation can be
    return Plan(path.stem, config, tuple(runs))


def base_of(base: str | dict[str, Any], file: Path) -> tuple[dict[str, Any], str]:
    if isinstance(base, dict):
        return base, f"{file}: base"
    beside = file.parent / Path(base).expanduser()
    name = str(beside) if beside.exists() or not base.startswith("configs/") else base
    return read(name), name


def change(tree: dict[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    for path, value in changes.items():
        try:
            tree = override(tree, path, value)
        except ConfigError as error:
            raise ConfigError(f"{where}: path {path!r} names nothing. {error}") from None
    return tree


def resolve(variant: str, grid: Mapping[str, Any], seed: int, tree: dict[str, Any], where: str) -> Run:
    for path in SEEDS:
        tree = override(tree, path, seed)
    identity = digest({**tree, "run": {key: value for key, value in tree["run"].items() if key not in IRRELEVANT}})
    config = decode(LMConfig, tree["model"], where)
    parameters, state, per_token = sizes(config, where)
    name = "-".join([safe(variant), *(f"{short(path, grid)}={safe(plain(value))}" for path, value in grid.items()), f"seed{seed}", identity[:8]])
    return Run(name, variant, grid, seed, tree, identity, parameters, state, per_token)


@cache
def _sizes(text: str) -> tuple[int, int, int]:
    with torch.device("meta"):
        model = LM(decode(LMConfig, json.loads(text)))
    return (model.config.num_params(), *state_size(model))


def sizes(config: LMConfig, where: str) -> tuple[int, int, int]:
    """Parameters, bytes of state, bytes a token. Building on the meta device finds what a config alone does not show."""
    try:
        return _sizes(json.dumps(encode(config)))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


# ------------------------------------------------------------------------------------------------ complete runs


def settle(tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A complete run with the trees of memarch decoded and written out, so that a path into them either names something or is an error."""
    found: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in tree.items()}
    return _settle(found, where)


def _settle(tree: dict[str, Any], where: str) -> dict[str, Any]:
    name, seed = tree.pop("preset", None), tree.pop("seed", None)
    if name is not None:
        model = preset(name)
        for path, value in (tree.get("model") or {}).items():
            model = override(model, path, value, f"{where}: model")
        tree["model"] = model
    require("model" in tree, f"{where}: 'model' is missing; a complete run has one, or names a preset.")
    tree.setdefault("optim", encode(OptimConfig()))
    for group in GROUPS:
        tree[group] = tree.get(group) or {}
    for path in SEEDS if seed is not None else ():
        tree = override(tree, path, seed)
    for key in tree:
        require(key in names()[""], f"{where}: {allowed('key', key, names()[''])}")
    for group in GROUPS:
        require(isinstance(tree[group], Mapping), f"{where}: {group}: expected a mapping, got {tree[group]!r}.")
        for key in tree[group]:
            require(key in names()[group], f"{where}: {group}: {allowed('key', key, names()[group])}")
    require("train" in tree["data"], f"{where}: data.train is missing; a run needs something to learn.")
    for path, spec in TREES.items():
        head, _, rest = path.partition(".")
        if not rest or rest in tree[head]:
            node = tree[head][rest] if rest else tree[head]
            tree = override(tree, path, encode(decode(spec, node, f"{where}: {path}")))
    return tree


@cache
def names() -> dict[str, frozenset[str]]:
    """What a run's config may hold, by group; "" is the top. Read off the classes that take it, so there is no second list."""
    from lightning.pytorch import Trainer

    from memarch.data.module import TokenData
    from memarch.run import RunConfig
    from memarch.task import Task

    def of(cls: Any) -> frozenset[str]:
        return frozenset(inspect.signature(cls.__init__).parameters) - {"self", "model", "optim"}

    top = frozenset({"model", "optim", "preset", "seed", "seed_everything", *GROUPS})
    return {"": top, "trainer": of(Trainer), "data": of(TokenData), "task": of(Task), "run": of(RunConfig)}


# ------------------------------------------------------------------------------------------------ names


def plain(value: Any) -> Any:
    """A grid value as one cell of a table."""
    return value if isinstance(value, str | int | float | bool) else "null" if value is None else str(encode(value))


def safe(value: Any) -> str:
    """As part of a folder's name."""
    return re.sub(r"[^A-Za-z0-9._+]+", "_", str(value)).strip("_") or "_"


def short(path: str, grid: Mapping[str, Any]) -> str:
    """The last word of a path, where no other path of the grid ends in it."""
    last = path.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in grid) == 1 else path


def label(variant: str, grid: Mapping[str, Any]) -> str:
    return ", ".join([variant, *(f"{short(path, grid)} {plain(value)}" for path, value in grid.items())])
