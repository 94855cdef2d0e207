"""Text as bytes: a file or a folder, or what every machine has, the sources of Python's standard library.

Byte-level, so there is no tokenizer to fetch and the vocabulary is 256. All of it is held in memory; `prepare` and shards.py are for more
text than that. The standard library differs between Python versions: `fingerprint` says which text a number was measured on.
"""

import dataclasses
import functools
import hashlib
import sysconfig
from pathlib import Path
from typing import Literal

import numpy as np

from memarch.config import require
from memarch.data import documents
from memarch.data.draw import SPLITS
from memarch.data.packed import Packed, Stream

NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text(Packed):
    """A folder's documents are its files, `held_out` of them for validation and as many for testing, chosen by a hash of their content.
    A single file is one document: its last two parts of that size are held out. Binary files in a folder are passed over."""

    kind: Literal["text"] = "text"
    path: str | None = None  # None: the standard library
    length: int = 256
    held_out: float = 0.05
    carry: bool = False

    def __post_init__(self) -> None:
        require(self.length >= 1, f"text: length = {self.length}: must be at least 1.")
        require(0 < self.held_out < 0.5, f"text: held_out = {self.held_out}: must lie between 0 and 0.5; val and test take as much each.")

    @property
    def vocab_size(self) -> int:
        return 256

    @property
    def fingerprint(self) -> str:
        """A hash of all documents, whatever their names."""
        return _corpus(self.path, self.held_out)[1]

    def stream(self, split: str) -> Stream:
        return _corpus(self.path, self.held_out)[0][split]


@functools.lru_cache(maxsize=2)
def _corpus(path: str | None, held_out: float) -> tuple[dict[str, Stream], str]:
    """One stream per split. Read once per process: a forked worker finds it here."""
    found = _standard_library() if path is None else documents.files(Path(path).expanduser())
    alone = path is not None and len(found) == 1
    read = (file.read_bytes() for file in found)
    distinct = {data for data in read if data and (alone or not documents.is_binary(data))}
    require(bool(distinct), f"text: no text in {path or 'the standard library of this Python'}: no files, or all empty or binary.")
    # In order of a hash: neighbours in a folder are alike, and a stream that is read in order should not go through them topic by topic.
    texts = sorted(distinct, key=lambda data: hashlib.blake2b(data).digest())
    fingerprint = hashlib.blake2b(b"".join(hashlib.blake2b(data).digest() for data in texts), digest_size=8).hexdigest()
    parts: dict[str, list[bytes]] = {split: [] for split in SPLITS}
    if alone:
        parts = {split: [data] if data else [] for split, data in documents.cut(texts[0], val=held_out, test=held_out).items()}
    else:
        for data in texts:
            parts[documents.split(data, val=held_out, test=held_out)].append(data)
    return {split: _stream(datas) for split, datas in parts.items()}, fingerprint


def _stream(datas: list[bytes]) -> Stream:
    ends = np.cumsum([0, *map(len, datas)], dtype=np.int64)
    return Stream((np.frombuffer(b"".join(datas), dtype=np.uint8),), ends[:-1])


def _standard_library() -> list[Path]:
    """Sources without tests and without what the machine's build wrote about itself."""
    root = Path(sysconfig.get_paths()["stdlib"])
    require(root.is_dir(), "text: this Python has no standard library in plain files: name a file or folder of text with `path`.")
    return [file for file in documents.files(root) if _is_source(file.relative_to(root))]


def _is_source(file: Path) -> bool:
    written_by_build = file.name.startswith("_sysconfigdata") or file.parts[0].startswith("config-")
    return file.suffix == ".py" and not NOT_SOURCE.intersection(file.parts) and not written_by_build
