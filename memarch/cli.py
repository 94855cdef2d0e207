"""The command line. `memarch COMMAND --help` says the rest.

Every command is a file in memarch/commands, imported when it is asked for. A user's mistake is one line on stderr and exit status 2; a
traceback means a mistake of ours, and `--debug` shows one for everything.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from memarch.config import ConfigError, allowed

# name -> (module, what it does); `train` hands everything behind it to memarch.training
COMMANDS = {
    "train": ("", "train a model: everything behind it goes to the training command (memarch train fit --config FILE)"),
    "list": ("models", "named models with their sizes"),
    "doctor": ("doctor", "what runs on this machine, and why"),
    "prepare": ("prepare", "text into token shards"),
    "generate": ("generate", "text from a model, as it comes"),
    "evaluate": ("evaluate", "recall, copying, needle or text: a table and a figure"),
    "ablate": ("ablate", "variants x grid x seeds from one file"),
    "inspect": ("inspect", "what happened inside: the use of sparse memories in a run, the fidelity of a model's states"),
    "convert": ("convert", "Mamba weights of transformers or state-spaces into a memarch model, and back"),
    "warmup": ("warmup", "compile the C++ kernels for this CPU, once"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 good, 1 something failed or is refused, 2 a mistake in what was asked, 130 interrupted."""
    given = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in given
    try:
        return run([word for word in given if word != "--debug"], debug)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `memarch list | head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains at exit
        return 0
    except (ValueError, OSError, ImportError) as error:  # ConfigError is a ValueError
        if debug:
            raise
        print(f"memarch: {one_line(error)}", file=sys.stderr)
        return 2


def run(argv: list[str], debug: bool) -> int:
    if argv and argv[0] == "train":  # its options are not known here, and --help is its own
        from memarch import training

        training.main([*argv[1:], *(["--debug"] if debug else [])])
        return 0
    args = parser_for(argv).parse_args(argv)
    if args.command is None:
        parser_for(argv).print_help()
        return 0
    return importlib.import_module(f"memarch.commands.{COMMANDS[args.command][0]}").run(args) or 0


def parser_for(argv: list[str]) -> argparse.ArgumentParser:
    """Knows every command by name, and the options of the one that is asked for: the others are not imported."""
    from memarch import __version__

    parser = Parser(prog="memarch", description="Memory-augmented sequence models.", epilog="--debug, anywhere, shows the traceback of an error.")
    parser.add_argument("--version", action="version", version=f"memarch {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (module, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        if module and name in argv:
            importlib.import_module(f"memarch.commands.{module}").arguments(command)
    return parser


class Parser(argparse.ArgumentParser):
    """argparse, with the nearest name for an unknown command and no usage text in front of an error."""

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        unknown = next((word for word in args or () if not word.startswith("-")), None)
        if self.prog == "memarch" and unknown is not None and unknown not in COMMANDS:
            self.error(allowed("command", unknown, COMMANDS))
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} See {self.prog} --help.")


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename and error.strerror else text
