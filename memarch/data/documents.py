"""Files as documents, and which documents are held out.

The split of a document is a hash of its content: it does not move when files are renamed, added or read in another order, and copies of one
document never stand on both sides.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from memarch.config import require


def files(place: Path) -> list[Path]:
    """A file, or the files of a folder at any depth in order of name; hidden files and folders are left out."""
    require(place.exists(), f"{place}: no such file or folder.")
    return sorted(_walk(place)) if place.is_dir() else [place]


def _walk(folder: Path) -> Iterator[Path]:
    for at, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__pycache__"))]
        visible = (Path(at, name) for name in names if not name.startswith("."))
        yield from (file for file in visible if file.is_file())


def is_binary(data: bytes) -> bool:
    """Git's rule: a zero byte near the beginning."""
    return b"\0" in data[:8192]


def split(data: bytes, *, val: float, test: float = 0.0) -> str:
    """The split of one document among many; val and test are the expected shares of documents held out."""
    at = int.from_bytes(hashlib.blake2b(data, digest_size=8, person=b"memarch split").digest(), "little") / 2**64
    return "val" if at < val else "test" if at < val + test else "train"


def cut(data: bytes, *, val: float, test: float = 0.0) -> dict[str, bytes]:
    """The splits of one document that is all there is: its end is held out, as is the custom for single-file corpora."""
    first = _line_end(data, round(len(data) * (1 - val - test)))
    second = max(first, _line_end(data, round(len(data) * (1 - test))))
    return {"train": data[:first], "val": data[first:second], "test": data[second:]}


def _line_end(data: bytes, place: int) -> int:
    """The last place at or before `place` where a line ends, or else a character, so that no UTF-8 character is torn."""
    line = data.rfind(b"\n", 0, place) + 1
    if line or place >= len(data):
        return place if place >= len(data) else line
    while place > 0 and data[place] & 0xC0 == 0x80:
        place -= 1
    return place
