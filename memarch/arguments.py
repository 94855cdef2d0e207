"""What a user says, in files and on the command line, as one tree; and one clear sentence when it cannot be.

Lightning's parser knows the trainer. The trees of memarch (model, optim, data.train, data.val) are settled here, before that parser sees
them: read from files, filled from a preset, changed by flags of any depth, and checked by memarch.config, whose messages name the wrong
key, list what is allowed and suggest the nearest. Everything goes in the order it is said in, and what is named is replaced.
"""

import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from memarch.config import ConfigError, decode, encode, override, require
from memarch.config_file import near, read, scalar
from memarch.data import DataConfig
from memarch.models.lm import LMConfig
from memarch.models.presets import preset
from memarch.optim import OptimConfig

TREES: dict[str, Any] = {"model": LMConfig, "optim": OptimConfig, "data.train": DataConfig, "data.val": DataConfig | None}
SEEDS = ("seed_everything", "task.seed", "data.seed")  # what --seed sets
RESOLVED = "config.yaml"  # in the folder of a run


class Settled:
    """The trees as plain data (`nodes`), and the arguments that are left for Lightning's parser (`argv`), files as JSON among them."""

    def __init__(self, argv: list[str], default: str, known: set[str]):
        self.nodes: dict[str, Any] = {}
        self.known = known
        self.files: list[str] = []
        self.argv: list[str] = []
        said = list(pairs(argv))
        self.print = any(name == "print_config" for name, _ in said)
        if not any(name in ("config", "resume") for name, _ in said):
            said.insert(0, ("config", default))
        # Files are whole trees and flags change places in them, so a flag may stand before the file it changes.
        for name, value in said:
            if name in ("config", "resume"):
                self.file(resumed(needed(name, value)) if name == "resume" else needed(name, value))
        for name, value in said:
            self.flag(name, value)
        for path, spec in TREES.items():
            if path in self.nodes:
                self.nodes[path] = encode(decode(spec, self.nodes[path], path))
        self.argv += ["--config", json.dumps(nest(self.nodes))] if self.nodes else []

    def file(self, name: str) -> None:
        tree = read(name)
        self.files.append(name)
        if tree.get("preset") is not None:
            self.nodes["model"] = preset(tree["preset"])
        for path, spec in TREES.items():
            head, _, rest = path.partition(".")
            if rest and isinstance(tree.get(head), Mapping) and rest in tree[head]:
                self.merge(path, tree[head][rest], name)
                tree[head] = {key: value for key, value in tree[head].items() if key != rest}
            elif not rest and head in tree:
                self.merge(path, tree.pop(head), name)
            if path in self.nodes:
                self.nodes[path] = encode(decode(spec, self.nodes[path], f"{name}: {path}"))
        tree = {key: value for key, value in tree.items() if key not in ("preset", "resume", "debug")}
        seed = tree.pop("seed", None)
        if seed is not None:
            self.argv += seeds(seed)
        self.check(tree, "", name)
        self.argv += ["--config", json.dumps(tree)] if tree else []

    def merge(self, path: str, value: Any, name: str) -> None:
        """A file's tree: its keys, which may be dotted, replace those of what was there; another kind replaces all."""
        if not isinstance(value, Mapping) or path not in self.nodes or self.nodes[path] is None:
            self.nodes[path] = dict(value) if isinstance(value, Mapping) else value
            return
        if value.get("kind", self.nodes[path].get("kind")) != self.nodes[path].get("kind"):
            self.nodes[path] = {}
        for key, inner in value.items():
            self.nodes[path] = override(self.nodes[path], str(key), inner, f"{name}: {path}")

    def flag(self, name: str, value: str | None) -> None:
        if name in ("config", "resume", "debug", "print_config"):
            self.argv += ["--run.folder", needed(name, value)] if name == "resume" else []
        elif name == "preset":
            self.nodes["model"] = encode(decode(LMConfig, preset(needed(name, value)), f"preset {value}"))
        elif name == "seed":
            self.argv += seeds(needed(name, value))
        elif (path := inside(name)) is not None:
            self.set(path, name[len(path) + 1 :], scalar(needed(name, value)))
        else:
            if name and name.rstrip("+") not in self.known:
                self.unknown(name)
            self.argv += [*([f"--{name}"] if name else []), *([value] if value is not None else [])]

    def set(self, path: str, inner: str, value: Any) -> None:
        node = self.nodes.get(path)
        if not inner:
            self.nodes[path] = read(value) if isinstance(value, str) else value
        elif inner == "kind":
            self.nodes[path] = node if node is not None and node.get("kind") == value else {"kind": value}
        elif inner.endswith(".kind"):
            parent = inner.removesuffix(".kind")
            same = get(node, parent)
            if not (isinstance(same, Mapping) and same.get("kind") == value):
                self.nodes[path] = override({} if node is None else node, parent, {"kind": value}, path)
        else:
            self.nodes[path] = override({} if node is None else node, inner, value, path)

    # ---------------------------------------------------------------------------------------------- unknown names

    def check(self, tree: Mapping[str, Any], above: str, name: str) -> None:
        for key, value in tree.items():
            path = f"{above}.{key}" if above else str(key)
            deeper = any(known.startswith(f"{path}.") for known in self.known)
            if path not in self.known and not deeper:
                self.unknown(path, f"{name}: ")
            if deeper and isinstance(value, Mapping) and "class_path" not in value:
                self.check(value, path, name)

    def unknown(self, path: str, where: str = "") -> None:
        """An error, but not below an argument that is a whole of its own: the arguments of a logger are known to its class only."""
        parent, _, _ = path.rpartition(".")
        above = parent
        while above:
            if above in self.known and not any(known.startswith(f"{above}.") for known in self.known):
                return
            above = above.rpartition(".")[0]
        level = parent.count(".") + 2 if parent else 1
        siblings = {".".join(known.split(".")[:level]) for known in self.known if not parent or known.startswith(f"{parent}.")}
        siblings = siblings or {known.split(".")[0] for known in self.known}
        raise ConfigError(f"{where}unknown argument {path!r}.{near(path, siblings | self.known)} Allowed: {', '.join(sorted(siblings))}.")


def pairs(argv: list[str]) -> Iterable[tuple[str, str | None]]:
    """(name, value) of every flag; a word that belongs to no flag has the name ""."""
    words = list(argv)
    while words:
        word = words.pop(0)
        if not is_flag(word):
            yield "", word
            continue
        name, equals, value = word.lstrip("-").partition("=")
        if not equals and words and not is_flag(words[0]):
            value = words.pop(0)
            equals = "="
        yield {"c": "config"}.get(name, name), value if equals else None


def is_flag(word: str) -> bool:
    return word.startswith("-") and not re.fullmatch(r"-[0-9.]+([eE][-+]?[0-9]+)?", word)


def needed(name: str, value: str | None) -> str:
    require(value is not None, f"--{name} needs a value: --{name} VALUE.")
    return str(value)


def seeds(value: Any) -> list[str]:
    require(str(value).isdigit(), f"seed must be a whole number, 0 or more, got {value!r}.")
    return [word for name in SEEDS for word in (f"--{name}", str(value))]


def inside(name: str) -> str | None:
    return next((path for path in TREES if name == path or name.startswith(f"{path}.")), None)


def get(data: Any, path: str) -> Any:
    """The node at a dotted path, or None."""
    for key in path.split("."):
        if isinstance(data, list):
            data = data[int(key)] if key.isdigit() and int(key) < len(data) else None
        else:
            data = data.get(key) if isinstance(data, Mapping) else None
    return data


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path, value in flat.items():
        *above, last = path.split(".")
        node = found
        for key in above:
            node = node.setdefault(key, {})
        node[last] = value
    return found


def resumed(folder: str) -> str:
    file = Path(folder).expanduser() / RESOLVED
    require(file.is_file(), f"--resume {folder}: no {RESOLVED} there, so it is not the folder of a run. Runs are in runs/<name>/<time>.")
    return str(file)


# ------------------------------------------------------------------------------------------------ Lightning's own arguments


def explain(error: Exception, parser: Any, argv: list[str]) -> str:
    """What jsonargparse says about an argument of Lightning's, in one sentence."""
    text = " ".join(str(error).split())
    key = next((key for key in re.findall(r'Parser key "([^"]+)"', text) if f"--{key}" in parser._option_string_actions), None)
    if key is None or key == "config":
        return text.removeprefix('Parser key "config": ')[:400]
    hint = getattr(parser._option_string_actions[f"--{key}"], "_typehint", None)
    value = re.search(r"Got value: (.*?)(?: - |$)", text)
    said = argv[argv.index(f"--{key}") + 1] if f"--{key}" in argv[:-1] else value[1] if value else None
    got = f", got {said!r}" if said is not None else ""
    return f"{key}: expected {words(hint)}{got}." if hint is not None else text[:400]


def words(hint: Any) -> str:
    """A type as a user would say it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(words(arg) for arg in args))
    if origin is typing.Literal:
        return ", ".join(map(str, args))
    if hint is type(None):
        return "null"
    return getattr(hint, "__name__", str(hint)) if origin is None else str(hint).replace("typing.", "")
