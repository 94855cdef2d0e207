"""Token shards on disk: what `prepare` writes, mapped into memory and read in place.

    folder/index.json            what is inside; written last
           train-00000.npy ..    the tokens, one flat array of unsigned integers per file
           train-begins.npy      int64, the first token of each document
           val-.. likewise       tokenizer.json, when there is one

File names follow from the split and a number, so an index names no path.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from memarch.config import allowed, require
from memarch.data.packed import Packed, Stream

FORMAT = 1
AGAIN = "the folder was changed or copied in part; run `memarch prepare` again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One split of a folder of shards."""

    tokens: int
    documents: int
    shards: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    dtype: str
    vocab_size: int
    tokenizer: str  # "bytes", or the name of the file the tokenizer came from
    fingerprint: str  # of tokenizer and documents together
    splits: dict[str, Part]

    def write(self, folder: Path) -> None:
        (folder / "index.json").write_text(json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Index":
        file = folder / "index.json"
        require(file.is_file(), f"{folder}: no index.json, so this is no finished folder of token shards: make one with `memarch prepare`.")
        try:
            data: dict[str, Any] = json.loads(file.read_text())
            version = data.pop("format")
            require(version == FORMAT, f"{file}: format {version}, and this memarch reads format {FORMAT}: run `memarch prepare` again.")
            splits = {split: Part(**part) for split, part in data.pop("splits").items()}
            return cls(splits=splits, **data)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: not an index of token shards ({error!r}): run `memarch prepare` again.") from None


def shard_file(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}-{number:05d}.npy"


def begins_file(folder: Path, split: str) -> Path:
    return folder / f"{split}-begins.npy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shards(Packed):
    kind: Literal["shards"] = "shards"
    path: str
    length: int = 256
    carry: bool = False

    def __post_init__(self) -> None:
        require(self.length >= 1, f"shards: length = {self.length}: must be at least 1.")

    @property
    def index(self) -> Index:
        return Index.read(Path(self.path).expanduser())

    @property
    def vocab_size(self) -> int:
        return self.index.vocab_size

    @property
    def fingerprint(self) -> str:
        return self.index.fingerprint

    def stream(self, split: str) -> Stream:
        return _open(str(Path(self.path).expanduser()), split)


@functools.lru_cache(maxsize=8)
def _open(path: str, split: str) -> Stream:
    folder, index = Path(path), Index.read(Path(path))
    require(split in index.splits, f"{folder}: {allowed('split', split, index.splits)} `memarch prepare` writes what it is told to hold out.")
    part = index.splits[split]
    pieces = [_map(shard_file(folder, split, number)) for number in range(part.shards)]
    stream = Stream(pieces, _map(begins_file(folder, split)))
    whole = len(stream) == part.tokens and len(stream.begins) == part.documents and all(piece.dtype == index.dtype for piece in pieces)
    require(whole, f"{folder}: the files do not hold what index.json says: {AGAIN}.")
    return stream


def _map(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({error}): {AGAIN}.") from None
