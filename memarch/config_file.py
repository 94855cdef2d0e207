"""Config files: where they are, how they are read, and what is said when they cannot be.

`configs/...` names a shipped run wherever memarch is installed. Files are YAML, of which JSON is a part.
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from memarch.config import ConfigError, require


class Loader(yaml.SafeLoader):
    """YAML in which 5e-3 is a number and NO, ON and Y are words: they are fine patterns of layers."""


SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf)|\.(nan|NaN)", "-+.0123456789"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}
Loader.yaml_implicit_resolvers = {}
for tag, (pattern, first) in SCALARS.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), list(first))


def shipped() -> Path:
    """The folder of complete runs: beside the package in a checkout, inside it in a wheel."""
    here = Path(__file__).resolve().parent
    beside = here.parent / "configs"
    return beside if (beside / "recall").is_dir() else here / "configs"


def find(name: str) -> Path:
    """A config file. configs/... is also found where the package is installed without a checkout."""
    path = Path(name).expanduser()
    if not path.exists() and path.parts[:1] == ("configs",):
        path = shipped().joinpath(*path.parts[1:])
    if not path.is_file():
        known = {f"configs/{file.relative_to(shipped())}" for file in shipped().rglob("*.yaml")}
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"config file {name} {what}.{near(name, known)} Shipped: {', '.join(sorted(known)) or 'none'}.")
    return path


def read(name: str) -> dict[str, Any]:
    path = find(name)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except UnicodeDecodeError:
        raise ConfigError(f"{name} is not text in UTF-8; a config is YAML or JSON.") from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        where = f", line {mark.line + 1}" if mark else ""
        why = "a tab; YAML wants spaces, so replace it with two" if "'\\t'" in problem else f"not YAML: {' '.join(problem.split())}"
        raise ConfigError(f"{name}{where}: {why}.") from None
    require(isinstance(data, dict), f"{name}: expected a mapping such as `model: ...`, got {data!r}.")
    return data


def scalar(text: str) -> Any:
    """A word of the command line, read as a file would be."""
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError:
        return text


def near(name: str, known: Iterable[str]) -> str:
    """The nearest known name, or the one that ends in this name: --lr is optim.lr."""
    known = sorted(known)
    ends = [full for full in known if full.rpartition(".")[2] == name]
    close = ends[:1] or difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
