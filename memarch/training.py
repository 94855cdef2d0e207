"""The command: a config in, a trained model out. `python train.py fit --config configs/recall/hybrid.yaml --optim.lr 1e-3`

Lightning's own command line with four trees of memarch in it: --model, --optim, --data.train and --data.val. How they are read, and what is
said about mistakes in them, is in arguments.py; what is kept of a run is in run.py. Here the pieces are put together and run.
"""

import logging
import shlex
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from memarch.arguments import SEEDS, TREES, Settled, explain, get
from memarch.callbacks import NonFinite, default_callbacks, latest, logger, step_of
from memarch.config import ConfigError, allowed, decode, require
from memarch.data import DATA
from memarch.data.module import TokenData
from memarch.models.lm import LM, LMConfig
from memarch.optim import OptimConfig
from memarch.run import RunConfig, claim, describe, named_after, versions
from memarch.task import Task

DEFAULT = "configs/recall/default.yaml"
COMMANDS = ("fit", "validate")
TRAINER = {  # where a run of this package is not what Lightning expects: endless data, measured in steps
    "max_epochs": -1,
    "check_val_every_n_epoch": None,
    "val_check_interval": 100,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "logger": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}
ASKED = ("config", "preset", "seed", "resume", "debug", "ckpt_path", "weights_only", "verbose")  # how a config was asked for, not what it is
MISSING = {
    "model": "there is no model: name one with --preset NAME (memarch list prints them), or give a config file with `model:`.",
    "data.train": f"there is nothing to train on: set --data.train.kind, one of {', '.join(sorted(DATA))}, or data.train in a config file.",
}
NOISE = (  # said on every run, and nobody can act on it
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*does not have many workers.*",
    r".*callbacks used to create the checkpoint need to be provided.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*You're resuming from a checkpoint that ended before the epoch ended.*",
    r".*Starting from v1\.9\.0, `tensorboardX` has been removed.*",
)


@dataclass
class Run:
    """What a command leaves behind. `metrics` are the last values of everything that was logged."""

    command: str
    trainer: Trainer
    task: Task
    data: TokenData
    folder: Path | None
    config: dict[str, Any]
    metrics: dict[str, float]


class Command(LightningCLI):
    """Parses and builds; `go` runs. `build` makes the model of its config and a seed."""

    def __init__(self, words: list[str], build: Callable[..., LM]):
        self.words, self.build = words, build
        self.folder: Path | None = None  # of the run; without one in validate when only a checkpoint is named
        strict = {"exit_on_error": False}
        super().__init__(
            Task,
            TokenData,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs=strict | {name: dict(strict) for name in self.subcommands()},
            trainer_defaults=TRAINER,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the one that is asked for: describing the trainer takes Lightning a third of a second each time."""
        wanted = self.words[:1] if self.words[0] in COMMANDS else COMMANDS
        return {name: LightningCLI.subcommands()[name] for name in wanted}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--preset", type=str | None, default=None, help="A named model (memarch list prints them) in place of the file's.")
        parser.add_argument("--seed", type=int | None, default=None, help="One number for weights, data and all else: task.seed, data.seed, seed_everything.")
        parser.add_argument("--resume", type=str | None, default=None, help="The folder of a run, which then goes on exactly where it stopped.")
        parser.add_argument("--debug", type=bool, default=False, help="Show the traceback of an error.")
        parser.add_argument("--model", type=LMConfig, help="The model. Every place in its tree is an argument: --model.parts.A.mixer.heads 4")
        parser.add_argument("--optim", type=OptimConfig, default=OptimConfig())
        parser.add_argument("--data.train", type=dict, help=f"What to train on: --data.train.kind and its fields. Kinds: {', '.join(sorted(DATA))}.")
        parser.add_argument("--data.val", type=dict | None, default=None, help="What to validate on; null: the held-out split of the same.")
        parser.add_class_arguments(TokenData, "data", skip={"train", "val"}, instantiate=False)
        parser.add_class_arguments(Task, "task", skip={"model", "optim"}, instantiate=False)
        parser.add_class_arguments(RunConfig, "run")
        parser.add_lightning_class_args(Trainer, "trainer")
        parser.set_defaults({f"trainer.{name}": value for name, value in self.trainer_defaults.items()})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        name, *rest = self.words
        if name in ("-h", "--help"):
            parser.parse_args(["--help"])
        require(name in COMMANDS, allowed("command", name, COMMANDS))
        inner = self._subcommand_parsers[name]
        known = {option[2:] for option in inner._option_string_actions if option.startswith("--")}
        self.settled = Settled(rest, DEFAULT, known)
        for path, why in MISSING.items():
            require(path in self.settled.nodes, why)
        try:
            self.config = parser.parse_args([name, *self.settled.argv])
        except ArgumentError as error:
            raise ConfigError(explain(error, inner, self.settled.argv)) from error
        if self.settled.print:
            print(yaml.safe_dump(self.resolved(), sort_keys=False), end="")
            raise SystemExit(0)

    def resolved(self) -> dict[str, Any]:
        """Everything, defaults written out, as a config file. How it was asked for is left out: it would be asked for again."""
        name = self.words[0]
        data: dict[str, Any] = yaml.safe_load(self._subcommand_parsers[name].dump(self.config[name], skip_unset=False))
        data["run"]["folder"] = None
        return {key: value for key, value in data.items() if key not in ASKED}

    # ---------------------------------------------------------------------------------------------- build

    def instantiate_classes(self) -> None:
        self.config_init = self.parser.instantiate(self.config)
        self.said: RunConfig = self._get(self.config_init, "run")
        if self.said.threads is not None:
            torch.set_num_threads(self.said.threads)
        self.datamodule = TokenData(**self._get(self.config, "data").as_dict() | {name: self.tree(f"data.{name}") for name in ("train", "val")})
        config, task = self.tree("model"), self._get(self.config, "task")
        suits(config, self.datamodule.train)
        wide, need = config.vocab_size, self.datamodule.vocab_size
        require(config.embed != "tokens" or wide >= need, f"the data have {need} token ids and model.vocab_size is {wide}: set --model.vocab_size {need}.")
        self.model = Task(self.build(config, seed=task.seed), self.tree("optim"), **task.as_dict())
        if self.words[0] == "fit":
            self.folder = claim(self.said, named_after(self.settled.files[-1]))
        elif self.said.folder is not None:
            self.folder = Path(self.said.folder)
        self.trainer = self.instantiate_trainer()

    def tree(self, path: str) -> Any:
        return decode(TREES[path], self.settled.nodes.get(path, {} if path == "optim" else None), path)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        given = self._get(self.config_init, "trainer")
        if self.words[0] == "fit":
            assert self.folder is not None
            kwargs["callbacks"] = [*(given.callbacks or []), *callbacks(self.folder, self.said)]
            if not self.said.bar:
                kwargs["enable_progress_bar"] = False  # or Lightning puts its own there
            if self.said.logger is not None:
                found = latest(self.folder)
                kwargs["logger"] = logger(self.said.logger, self.folder, step_of(found) if found else 0)
        else:
            kwargs |= {"enable_progress_bar": False, "enable_checkpointing": False}
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError) as error:
            if self.folder is not None and self.words[0] == "fit" and not any(self.folder.iterdir()):
                self.folder.rmdir()
            raise ConfigError(f"trainer: {error}") from error

    # ---------------------------------------------------------------------------------------------- run

    def _run_subcommand(self, subcommand: str) -> None:
        """Not from the constructor, where a mistake of the user and a failure of training look the same."""

    def go(self) -> Run:
        command, asked = self.words[0], self._get(self.config_init, "ckpt_path")
        found = latest(self.folder) if self.folder is not None and asked is None else asked
        if command == "fit":
            assert self.folder is not None
            if self.trainer.is_global_zero:
                describe(self.folder, self.resolved())
            self.trainer.fit(self.model, self.datamodule, ckpt_path=found)
            metrics = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
            if self.said.export and self.trainer.is_global_zero:
                export(self.model.model, self.folder / "export", metrics, self.resolved(), shlex.join(["memarch", "train", *self.words]))
            if dist.is_initialized():  # processes that leave one by one sometimes abort
                dist.barrier()
                dist.destroy_process_group()
        else:
            require(found is not None, "validate needs trained weights: --resume FOLDER of a run, or --ckpt_path FILE.")
            metrics = dict(self.trainer.validate(self.model, self.datamodule, ckpt_path=found, verbose=False)[0])
            print("  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        return Run(command, self.trainer, self.model, self.datamodule, self.folder, self.resolved(), metrics)


def suits(model: LMConfig, data: Any) -> None:
    """Tokens are for models of tokens, and numbers for models of as many."""
    has = (model.inputs if model.embed == "linear" else None, model.outputs if model.head == "regression" else None)
    wants = (getattr(data, "inputs", None), getattr(data, "outputs", None))
    if wants == (None, None):
        require(has == wants, f"the data are tokens ({data.kind}): set model.embed and model.head to tokens.")
    require(
        has == wants,
        f"the data are numbers ({data.kind}): set model.embed linear, inputs {wants[0]}, head regression, outputs {wants[1]} and tie false.",
    )


def callbacks(folder: Path, said: RunConfig) -> list[Callback]:
    """What every run has, in the order in which Lightning calls them."""
    stop = EarlyStopping("val/accuracy", mode="max", stopping_threshold=said.stop_at, patience=sys.maxsize, check_on_train_epoch_end=False)
    usual = default_callbacks(
        folder, save_every=said.save_every, save_minutes=said.save_minutes, keep=said.keep, patience=said.patience, flops=said.flops, bar=said.bar
    )
    return usual if said.stop_at is None else [stop, *usual]


def export(model: LM, folder: Path, metrics: dict[str, float], config: dict[str, Any], command: str) -> None:
    """The model as others load it: config.json, model.safetensors, and a card with the run's own numbers."""
    from memarch.hub import save_pretrained

    found = versions()
    card = {
        "metrics": metrics,
        "data": config["data"],
        "command": command,
        "hardware": found.pop("device"),
        "seeds": {name: get(config, name) for name in SEEDS},
        "versions": {name: value for name, value in found.items() if isinstance(value, str)},
    }
    save_pretrained(model, folder, card=card)


def main(argv: list[str] | None = None, *, build: Callable[..., LM] = LM) -> Run:
    """Run the command. No command means fit; no argument at all means the default run, which then shows what its model can do.

    A mistake of the user is one sentence on stderr and exit status 2, without a traceback unless --debug asks for it."""
    given = list(sys.argv[1:] if argv is None else argv)
    quiet()
    if given:
        return start(given, build)
    from memarch.tour import hello, tour

    hello()
    run = start([], build)
    tour(run, lambda *flags: start(["fit", *flags], build))
    return run


def start(given: list[str], build: Callable[..., LM]) -> Run:
    fit = not given or (given[0].startswith("-") and given[0] not in ("-h", "--help"))
    words = ["fit", *given] if fit else given
    try:
        command = Command(words, build)
    except (ConfigError, MisconfigurationException, ValueError, OSError, ImportError) as error:
        fail(error, words, 2)
    try:
        return command.go()
    except (ConfigError, MisconfigurationException) as error:
        fail(error, words, 2)
    except NonFinite as error:
        fail(error, words, 1)


def fail(error: Exception, words: list[str], status: int) -> NoReturn:
    if "--debug" in words:
        raise error
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(status) from None


def quiet() -> None:
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in NOISE:
        warnings.filterwarnings("ignore", message=text)
