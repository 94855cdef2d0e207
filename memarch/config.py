"""Frozen dataclasses <-> JSON. Strict: what is not known is an error that names it, lists what is allowed and suggests the nearest.

A config is data. `kind` chooses a member of a closed table, so a file from the Hub can name nothing but what memarch ships;
no import path is ever followed.
"""

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union

import torch
from torch import nn


class ConfigError(ValueError):
    """A config that cannot be: the message says where, what is allowed and what to do."""


def allowed(what: str, name: object, known: Iterable[str]) -> str:
    """One sentence about an unknown name."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {name!r}.{hint} Allowed: {', '.join(known)}."


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """What a layer file declares. A kind is in the table of its family, and being in the table is being tested.

    Subclasses set `kind: Literal["..."] = "..."`, `family` and `paper`, and offer:
    `make(dim, pools)` the bare module, `num_params(dim)` its exact size, `examples()` small configs that between them use every option."""

    paper: typing.ClassVar[str] = ""

    def make(self, dim: int, pools: Mapping[str, nn.Module]) -> nn.Module:
        raise NotImplementedError

    def build(self, dim: int, *, seed: int = 0, depth: int = 1, pools: Mapping[str, nn.Module] | None = None) -> Any:
        """The layer, ready to use in any nn.Module. On the meta device nothing is computed."""
        layer = self.make(dim, pools or {})
        initialise(layer, depth, seed)
        return layer

    def num_params(self, dim: int) -> int:
        raise NotImplementedError

    def active_params(self, dim: int) -> int:
        """Parameters that one token touches: fewer than all of them in a sparse memory."""
        return self.num_params(dim)

    def pool_size(self, dim: int) -> tuple[int, int]:
        """Rows and width of the table that this layer reads, owned or borrowed from a pool of the model."""
        raise NotImplementedError

    def borrows(self, dim: int) -> dict[str, tuple[int, int]]:
        """The pools of the model that it reads, by name: rows and width."""
        name = getattr(self, "pool", None)
        return {} if name is None else {name: self.pool_size(dim)}

    def span(self) -> int:
        """The longest chunk, window or segment of this layer: the laws are tested over more than three of them."""
        return 1

    @classmethod
    def examples(cls) -> "list[LayerConfig]":
        raise NotImplementedError


def initialise(module: Any, depth: int, seed: int) -> None:
    """Fill a freshly made module from a seed. The same seed gives the same weights on every device: numbers are drawn on the CPU."""
    if not any(p.is_meta for p in module.parameters()):
        with torch.no_grad():
            module.init_(depth, torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ decode, encode


def decode(spec: Any, data: Any, where: str = "config") -> Any:
    """Data from JSON or YAML as a value of type `spec`; `where` is the path that an error names."""
    if dataclasses.is_dataclass(spec) and isinstance(spec, type):
        return _decode_dataclass(spec, data, where)
    origin, args = typing.get_origin(spec), typing.get_args(spec)
    if origin in (Union, types.UnionType):
        return _decode_union(args, data, where)
    if origin is Literal:
        require(data in args, f"{where}: {allowed('value', data, map(str, args))}")
        return data
    if origin is tuple:
        require(isinstance(data, list | tuple), f"{where}: expected a list, got {data!r}.")
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
        require(len(data) == len(args), f"{where}: expected {len(args)} values, got {len(data)}: {data!r}.")
        return tuple(decode(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(zip(args, data, strict=True)))
    if origin is dict:
        require(isinstance(data, dict), f"{where}: expected a mapping, got {data!r}.")
        return {key: decode(args[1], value, f"{where}.{key}") for key, value in data.items()}
    return _decode_plain(spec, data, where)


def _decode_dataclass(cls: type, data: Any, where: str) -> Any:
    if isinstance(data, cls):
        return data
    require(isinstance(data, Mapping), f"{where}: expected a mapping for {cls.__name__}, got {data!r}.")
    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        require(key in fields, f"{where}: {allowed('key', key, fields)}")
    for name, field in fields.items():
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        require(not needed or name in data, f"{where}: {name!r} is missing; {cls.__name__} cannot do without it.")
    values = {key: decode(hints[key], value, f"{where}.{key}") for key, value in data.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


def _decode_union(args: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None:
        require(type(None) in args, f"{where}: null is not allowed here.")
        return None
    kinds: dict[str, Any] = {kind_of(arg): arg for arg in args if dataclasses.is_dataclass(arg)}
    if kinds:
        if isinstance(data, tuple(kinds.values())):
            return data
        require(isinstance(data, Mapping), f"{where}: expected a mapping with a kind, got {data!r}. Kinds: {', '.join(sorted(kinds))}.")
        require("kind" in data, f"{where}: 'kind' is missing. Allowed: {', '.join(sorted(kinds))}.")
        require(data["kind"] in kinds, f"{where}: {allowed('kind', data['kind'], kinds)}")
        return decode(kinds[data["kind"]], data, where)
    errors = []
    for arg in args:
        if arg is not type(None):
            try:
                return decode(arg, data, where)
            except ConfigError as error:
                errors.append(str(error))
    raise ConfigError(errors[0])


def _decode_plain(spec: Any, data: Any, where: str) -> Any:
    if spec is Any:
        return data
    if spec is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    good = isinstance(data, spec) and not (spec in (int, float) and isinstance(data, bool))
    require(good, f"{where}: expected {spec.__name__}, got {data!r}.")
    return data


def kind_of(cls: Any) -> str:
    return next((str(f.default) for f in dataclasses.fields(cls) if f.name == "kind"), cls.__name__)


def encode(config: Any) -> Any:
    """Plain data with every field written out, so that a later change of a default changes no saved model."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: encode(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: encode(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [encode(value) for value in config]
    return config


def digest(config: Any) -> str:
    """A short name for what a config says: a state saved by one model is refused by another."""
    return hashlib.sha256(json.dumps(encode(config), sort_keys=True).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------ set


def override(data: Any, path: str, value: Any, where: str = "") -> Any:
    """`data` with the node at a dotted path replaced: override(d, "parts.G.mixer.heads", 8). Nothing is merged: what is named is replaced."""
    head, _, rest = path.partition(".")
    here = f"{where}.{head}" if where else head
    if isinstance(data, list | tuple):
        require(head.isdigit() and int(head) < len(data), f"{here}: no such place; the list has {len(data)} items, counted from 0.")
        return [override(item, rest, value, here) if rest and i == int(head) else value if i == int(head) else item for i, item in enumerate(data)]
    require(isinstance(data, Mapping), f"{where}: {data!r} has nothing inside, so {path!r} cannot be set there.")
    if not rest:
        return {**data, head: value}
    require(head in data, f"{where or 'config'}: {allowed('key', head, data)}")
    return {**data, head: override(data[head], rest, value, here)}
